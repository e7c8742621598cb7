/*-------------------------------------------------------------------------
 *
 * buffer.c
 *	  What a buffer is: shape, options, owner.
 *
 * A buffer is a foreign table of our foreign-data wrapper.  This room reads
 * its definition from the catalogs, caches it in the backend, and rereads it
 * after a relation cache invalidation.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/parallel.h"
#include "access/relation.h"
#include "access/sysattr.h"
#include "access/transam.h"
#include "access/xact.h"
#include "buffer.h"
#include "catalog/catalog.h"
#include "catalog/namespace.h"
#include "catalog/pg_class.h"
#include "catalog/pg_foreign_table.h"
#include "catalog/pg_type.h"
#include "commands/defrem.h"
#include "compat.h"
#include "ddl.h"
#include "foreign/fdwapi.h"
#include "foreign/foreign.h"
#include "launch.h"
#include "miscadmin.h"
#include "nodes/nodes.h"
#include "storage/lmgr.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/hsearch.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/resowner.h"
#include "utils/syscache.h"

static HTAB *buffers = NULL;

/* result of the last lookup, or NULL */
static SbBuffer *recent = NULL;

uint64		buffer_generation = 1;

/*
 * Has the transaction opened a buffer, not counting those that
 * buffer_open_to_count() found unchanged?
 */
static bool any_opened = false;

/* has any buffer ever had row types in its keys? */
static bool any_row_types = false;

/* from this many entries on, remove those whose relations are gone */
#define FORGET_MIN			32

static long forget_at = FORGET_MIN;

/* source of BufferShape.version, for all buffers */
static uint64 last_version = 0;

/* ------------------------------------------------------------------------
 * Definitions
 * ------------------------------------------------------------------------
 */

/* Look up a relation's cache entry, or NULL. */
static SbBuffer *
find_buffer(Oid relid)
{
	if (recent == NULL || recent->relid != relid)
		recent = hash_search(buffers, &relid, HASH_FIND, NULL);
	return recent;
}

static void
invalidate_buffer(SbBuffer *buffer)
{
	buffer->valid = false;
	buffer->incrementer = InvalidOid;
}

/* Is this the relation of a row type that occurs in the buffer's keys? */
static bool
has_row_type(SbBuffer *buffer, Oid relid)
{
	if (buffer->shape != NULL)
		for (int i = 0; i < buffer->shape->nrow_types; i++)
			if (buffer->shape->row_types[i] == relid)
				return true;
	return false;
}

/*
 * Relation cache callback: a relation was altered, or with InvalidOid, any may
 * have been.
 */
static void
invalidate(Datum arg, Oid relid)
{
	HASH_SEQ_STATUS status;
	SbBuffer   *buffer;

	buffer_generation++;
	if (OidIsValid(relid) && !any_row_types)
	{
		buffer = hash_search(buffers, &relid, HASH_FIND, NULL);
		if (buffer != NULL)
			invalidate_buffer(buffer);
		return;
	}

	hash_seq_init(&status, buffers);
	while ((buffer = hash_seq_search(&status)) != NULL)
		if (!OidIsValid(relid) || buffer->relid == relid ||
			has_row_type(buffer, relid))
			invalidate_buffer(buffer);
}

/* Syscache callback: a role or its memberships were altered. */
static void
invalidate_roles(Datum arg, int cacheid, uint32 hashvalue)
{
	HASH_SEQ_STATUS status;
	SbBuffer   *buffer;

	buffer_generation++;
	hash_seq_init(&status, buffers);
	while ((buffer = hash_seq_search(&status)) != NULL)
		buffer->incrementer = InvalidOid;
}

/*
 * Syscache callback: a type, cast or function that key conversions may use was
 * altered.
 */
static void
invalidate_conversions(Datum arg, int cacheid, uint32 hashvalue)
{
	buffer_generation++;
}

/*
 * Syscache callback: foreign tables may have become buffers, or ceased to be.
 */
static void
invalidate_wrappers(Datum arg, int cacheid, uint32 hashvalue)
{
	invalidate(arg, InvalidOid);
}

/*
 * Remember that a check of the catalogs has found that the user has the INSERT
 * privilege, unless something has been altered since the check began, when
 * buffer_generation was `asked'.
 */
static void
note_incrementer(SbBuffer *buffer, Oid userid, uint64 asked)
{
	if (buffer_generation == asked)
		buffer->incrementer = userid;
}

/* Get a relation's name.  Raises an error if there is no such relation. */
static char *
relation_name(Oid relid)
{
	char	   *name = get_rel_name(relid);

	if (name == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_TABLE),
				 errmsg("relation with OID %u does not exist", relid)));
	return name;
}

/*
 * Raise PostgreSQL's own error if the current user lacks a privilege on a
 * relation, or if there is no such relation.
 *
 * Call this before locking the relation, so that users cannot lock relations
 * on which they have no privileges.  Checks the present privileges, even in a
 * transaction that began before they were altered.
 */
void
buffer_check_privilege(Oid relid, AclMode mode)
{
	char	   *name;
	AclResult	result;

	AcceptInvalidationMessages();
	name = relation_name(relid);
	result = pg_class_aclcheck(relid, GetUserId(), mode);
	if (result != ACLCHECK_OK)
		aclcheck_error(result, get_relkind_objtype(get_rel_relkind(relid)),
					   name);
}

/* Likewise, if the current user does not own the relation. */
void
buffer_check_owner(Oid relid)
{
	char	   *name;

	AcceptInvalidationMessages();
	name = relation_name(relid);
	if (!compat_owns_relation(relid, GetUserId()))
		aclcheck_error(ACLCHECK_NOT_OWNER,
					   get_relkind_objtype(get_rel_relkind(relid)), name);
}

/* Transaction callback: the next transaction has not opened a buffer. */
static void
forget_opened(XactEvent event, void *arg)
{
	if (event == XACT_EVENT_COMMIT || event == XACT_EVENT_ABORT ||
		event == XACT_EVENT_PREPARE)
		any_opened = false;
}

/* Set up this room.  Called once, when the module is loaded. */
void
buffer_init(void)
{
	HASHCTL		ctl = {
		.keysize = sizeof(Oid),
		.entrysize = sizeof(SbBuffer),
		.hcxt = TopMemoryContext
	};

	buffers = hash_create("statbuffer buffers", 16, &ctl,
						  HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);
	CacheRegisterRelcacheCallback(invalidate, (Datum) 0);
	CacheRegisterSyscacheCallback(AUTHOID, invalidate_roles, (Datum) 0);
	CacheRegisterSyscacheCallback(AUTHMEMROLEMEM, invalidate_roles, (Datum) 0);

	/* the database's owner is a member of pg_database_owner */
	CacheRegisterSyscacheCallback(DATABASEOID, invalidate_roles, (Datum) 0);
	CacheRegisterSyscacheCallback(TYPEOID, invalidate_conversions, (Datum) 0);
	CacheRegisterSyscacheCallback(PROCOID, invalidate_conversions, (Datum) 0);
	CacheRegisterSyscacheCallback(CASTSOURCETARGET, invalidate_conversions,
								  (Datum) 0);
	CacheRegisterSyscacheCallback(FOREIGNDATAWRAPPEROID, invalidate_wrappers,
								  (Datum) 0);
	CacheRegisterSyscacheCallback(FOREIGNSERVEROID, invalidate_wrappers,
								  (Datum) 0);
	RegisterXactCallback(forget_opened, NULL);
}

/*
 * FDW callback IsForeignRelUpdatable: a buffer accepts only INSERT.
 *
 * It is in this file because the pointer identifies our wrapper: a foreign
 * table is a buffer if its wrapper has this callback.
 */
int
buffer_updatable(Relation rel)
{
	return 1 << CMD_INSERT;
}

/* Is this relation a foreign table of our wrapper? */
bool
buffer_is_relation(Relation rel)
{
	Oid			serverid;
	Oid			fdwid;

	if (rel->rd_rel->relkind != RELKIND_FOREIGN_TABLE)
		return false;
	serverid = GetForeignServerIdByRelId(RelationGetRelid(rel));
	fdwid = GetForeignServer(serverid)->fdwid;

	/* GetFdwRoutineForRelation() would raise an error */
	if (!OidIsValid(GetForeignDataWrapper(fdwid)->fdwhandler))
		return false;
	return GetFdwRoutineForRelation(rel, false)->IsForeignRelUpdatable == buffer_updatable;
}

static void
report_wrong_shape(Relation rel, const char *detail)
{
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_TABLE_DEFINITION),
			 errmsg("foreign table \"%s\" does not have the shape of a buffer",
					RelationGetRelationName(rel)),
			 errdetail("%s", detail),
			 errhint("A buffer has one or more key columns of any type, followed by a column of type bigint for the count.")));
}

/*
 * Find the count column.  If the relation does not have the columns of a buffer,
 * returns InvalidAttrNumber, and sets `problem'.
 */
AttrNumber
buffer_find_count(Relation rel, const char **problem)
{
	TupleDesc	desc = RelationGetDescr(rel);
	Form_pg_attribute last = NULL;
	int			n = 0;

	for (int i = 0; i < desc->natts; i++)
	{
		Form_pg_attribute att = TupleDescAttr(desc, i);

		if (att->attisdropped)
			continue;
		if (att->attgenerated)
		{
			*problem = _("It has a generated column.");
			return InvalidAttrNumber;
		}
		last = att;
		n++;
	}
	if (n < 2)
	{
		*problem = _("It has fewer than two columns.");
		return InvalidAttrNumber;
	}
	if (last->atttypid != INT8OID)
	{
		*problem = _("Its last column is not of type bigint.");
		return InvalidAttrNumber;
	}
	return last->attnum;
}

/* The relations of row types, as an array. */
static Oid *
row_type_relations(List *row_types)
{
	Oid		   *relids = palloc((list_length(row_types) + 1) * sizeof(Oid));
	int			n = 0;
	ListCell   *lc;

	foreach(lc, row_types)
	{
		relids[n] = get_typ_typrelid(lfirst_oid(lc));
		if (!OidIsValid(relids[n++]))
			elog(ERROR, "cache lookup failed for type %u", lfirst_oid(lc));
	}
	return relids;
}

/*
 * Build the shape of a relation.  Raises an error if it does not have the
 * columns of a buffer.
 */
static BufferShape *
read_shape(Relation rel)
{
	TupleDesc	reldesc = RelationGetDescr(rel);
	BufferShape *shape = palloc0(sizeof(BufferShape));
	AttrNumber *attnos = palloc(Max(reldesc->natts, 1) * sizeof(AttrNumber));
	TupleDesc	desc;
	List	   *row_types;
	const char *problem;
	int			n = 0;

	shape->count_attno = buffer_find_count(rel, &problem);
	if (shape->count_attno == InvalidAttrNumber)
		report_wrong_shape(rel, problem);
	shape->count_name = TupleDescAttr(reldesc, shape->count_attno - 1)->attname;
	for (AttrNumber attno = 1; attno < shape->count_attno; attno++)
		if (!TupleDescAttr(reldesc, attno - 1)->attisdropped)
			attnos[n++] = attno;
	shape->key_attnos = attnos;
	desc = CreateTemplateTupleDesc(n);
	for (int i = 0; i < n; i++)
	{
		Form_pg_attribute att = TupleDescAttr(reldesc, attnos[i] - 1);

		TupleDescCopyEntry(desc, i + 1, reldesc, attnos[i]);

		/*
		 * Only for key_form().  heap_deform_tuple() must still expect nulls,
		 * because some may have been counted before the column became NOT
		 * NULL.  It does: it ignores this field, or looks at the compact copy
		 * of the attribute, which is not changed here.
		 */
		TupleDescAttr(desc, i)->attnotnull = att->attnotnull;
	}
	TupleDescFinalize(desc);
	shape->desc = desc;
	shape->is_text = key_is_one_text(desc);

	shape->keys = shape_describe(desc, attnos, &row_types);
	shape->row_types = row_type_relations(row_types);
	shape->nrow_types = list_length(row_types);
	return shape;
}

/* Set the tag of the lock on a relation, which may be a shared catalog. */
void
buffer_set_relation_tag(LOCKTAG *tag, Oid relid)
{
	SET_LOCKTAG_RELATION(*tag,
						 IsSharedRelation(relid) ? InvalidOid : MyDatabaseId,
						 relid);
}

/*
 * Set the tag of a buffer's gate.  A worker holds this lock, in ShareLock,
 * during each flush, and takes it before it locks the relation.  sb_start()
 * and sb_stop() take it in ExclusiveLock, to keep the worker from starting
 * anything before the option "stopped" is set.
 */
void
buffer_set_gate_tag(LOCKTAG *tag, Oid relid)
{
	SharedBufferKey key = {MyDatabaseId, relid};

	registry_set_locktag(tag, &key, REGISTRY_LOCK_GATE);
}

/*
 * Lock the row types of a shape.  Returns whether any of them was not locked
 * by the transaction before, in which case the shape may be out of date.
 */
static bool
lock_row_types(const BufferShape *shape, BufferLocker lock)
{
	bool		any = false;

	for (int i = 0; i < shape->nrow_types; i++)
	{
		LOCKTAG		tag;

		buffer_set_relation_tag(&tag, shape->row_types[i]);
		any |= !compat_lock_held(&tag, AccessShareLock);
		lock(shape->row_types[i], AccessShareLock);
	}
	return any;
}

/*
 * Build the shape of a relation, with its row types locked.  The result is in
 * a memory context of its own below the current one.
 */
static BufferShape *
read_and_lock_shape(Relation rel, BufferLocker lock)
{
	for (;;)
	{
		MemoryContext context = AllocSetContextCreate(CurrentMemoryContext,
													  "statbuffer shape",
													  ALLOCSET_SMALL_SIZES);
		MemoryContext oldcontext = MemoryContextSwitchTo(context);
		BufferShape *shape = read_shape(rel);

		MemoryContextSwitchTo(oldcontext);
		shape->context = context;

		/* a row type may have been altered before we locked it */
		if (!lock_row_types(shape, lock))
			return shape;
		MemoryContextDelete(context);
	}
}

/*
 * Are keys formed and read in the same way under both shapes?  If so, at most
 * the names and NOT NULL constraints of the columns differ.
 */
static bool
same_shape(const BufferShape *a, const BufferShape *b)
{
	if (a->count_attno != b->count_attno || !shape_equal(a->keys, b->keys))
		return false;
	for (int i = 0; i < a->desc->natts; i++)
	{
		Form_pg_attribute att_a = TupleDescAttr(a->desc, i);
		Form_pg_attribute att_b = TupleDescAttr(b->desc, i);

		if (a->key_attnos[i] != b->key_attnos[i] ||
			att_a->atttypid != att_b->atttypid ||
			att_a->atttypmod != att_b->atttypmod ||
			att_a->attcollation != att_b->attcollation)
			return false;
	}
	return true;
}

/*
 * Delete a memory context at the end of the transaction.  A scan, or a call
 * that runs user code, may be using it until then.
 */
static void
retire(MemoryContext context)
{
	if (context != NULL)
		MemoryContextSetParent(context, TopTransactionContext);
}

/*
 * Read the definition of a relation, which the caller has locked, into its
 * cache entry.  `lock' is used to lock its row types.
 */
static void
build(SbBuffer *buffer, Relation rel, BufferLocker lock)
{
	MemoryContext options_context;
	MemoryContext oldcontext;
	BufferShape *shape;
	BufferOptions options;
	uint64		asked;

	/* if anything here fails, the old definition stays intact */
	shape = read_and_lock_shape(rel, lock);
	asked = buffer_generation;
	options_context = AllocSetContextCreate(CurrentMemoryContext,
											"statbuffer options",
											ALLOCSET_SMALL_SIZES);
	oldcontext = MemoryContextSwitchTo(options_context);
	options_parse(GetForeignTable(RelationGetRelid(rel))->options, &options);
	MemoryContextSwitchTo(oldcontext);

	if (buffer->shape != NULL && same_shape(buffer->shape, shape))
	{
		/* keep the old shape, which a scan or a call may be using */
		for (int i = 0; i < shape->desc->natts; i++)
		{
			Form_pg_attribute att = TupleDescAttr(buffer->shape->desc, i);

			att->attname = TupleDescAttr(shape->desc, i)->attname;
			att->attnotnull = TupleDescAttr(shape->desc, i)->attnotnull;
		}
		buffer->shape->count_name = shape->count_name;
		MemoryContextDelete(shape->context);
	}
	else
	{
		if (buffer->shape != NULL)
			retire(buffer->shape->context);
		shape->buffer = buffer;
		shape->version = ++last_version;
		any_row_types |= shape->nrow_types > 0;
		MemoryContextSetParent(shape->context, TopMemoryContext);
		buffer->shape = shape;
	}

	retire(buffer->options_context);
	MemoryContextSetParent(options_context, TopMemoryContext);
	buffer->options_context = options_context;
	buffer->options = options;
	namestrcpy(&buffer->name, RelationGetRelationName(rel));
	buffer->owner = rel->rd_rel->relowner;
	buffer->created = rel->rd_createSubid != InvalidSubTransactionId;

	/* the epochs may be others */
	retire(buffer->epochs_context);
	buffer->epochs_context = NULL;
	buffer->epochs = NIL;

	/* find the shared part again, and look up its number for the shape */
	buffer->shared = NULL;
	buffer->in_force = false;

	/* if something was altered meanwhile, read it again next time */
	buffer->valid = buffer_generation == asked;
}

/*
 * Remove the cache entries of relations that are gone.  Otherwise a session
 * that keeps creating and dropping buffers would grow without bound.  Called
 * before the transaction opens its first buffer, so that nothing in use is
 * freed.  Buffers in which it has already counted have `pending' set.
 */
static void
forget_dropped(void)
{
	HASH_SEQ_STATUS status;
	SbBuffer   *buffer;
	List	   *relids = NIL;
	ListCell   *lc;

	/* collect the candidates first: catalog lookups may call invalidate() */
	hash_seq_init(&status, buffers);
	while ((buffer = hash_seq_search(&status)) != NULL)
		if (!buffer->valid && buffer->pending == NULL)
			relids = lappend_oid(relids, buffer->relid);

	recent = NULL;
	foreach(lc, relids)
	{
		Oid			relid = lfirst_oid(lc);

		if (SearchSysCacheExists1(RELOID, ObjectIdGetDatum(relid)))
			continue;
		buffer = hash_search(buffers, &relid, HASH_FIND, NULL);
		table_detach(&buffer->table);
		if (buffer->shape != NULL)
			MemoryContextDelete(buffer->shape->context);
		if (buffer->options_context)
			MemoryContextDelete(buffer->options_context);
		if (buffer->epochs_context)
			MemoryContextDelete(buffer->epochs_context);
		if (buffer->pending_space)
			pfree(buffer->pending_space);
		(void) hash_search(buffers, &relid, HASH_REMOVE, NULL);
	}
	list_free(relids);

	/* keep the cost proportional to the number of buffers opened */
	forget_at = Max(FORGET_MIN, 2 * hash_get_num_entries(buffers));
}

/*
 * Open a buffer whose relation the caller has locked to the end of the
 * transaction.  Locks its row types with `lock'.
 *
 * Raises an error if the relation is gone or is not a buffer, or in a parallel
 * worker.
 */
SbBuffer *
buffer_open_locked(Oid relid, BufferLocker lock)
{
	SbBuffer   *buffer;
	Relation	rel;

	/*
	 * What a parallel worker adds would be lost when it exits, and what the
	 * transaction has added so far is in the leader's memory.  Our functions
	 * only get here in a parallel worker if they are called by a function
	 * that is wrongly marked as parallel safe.
	 */
	if (IsParallelWorker())
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_TRANSACTION_STATE),
				 errmsg("cannot use a buffer in a parallel worker"),
				 errhint("Declare functions that use buffers as PARALLEL RESTRICTED or PARALLEL UNSAFE.")));

	if (!any_opened)
	{
		any_opened = true;
		if (hash_get_num_entries(buffers) >= forget_at)
			forget_dropped();
	}

	buffer = find_buffer(relid);
	if (buffer != NULL && buffer->valid)
	{
		if (buffer->shape->nrow_types > 0)
			(void) lock_row_types(buffer->shape, lock);
		if (buffer->valid)
			return buffer;
	}

	rel = try_relation_open(relid, NoLock);
	if (rel == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_TABLE),
				 errmsg("relation with OID %u does not exist", relid)));
	if (!buffer_is_relation(rel))
		ereport(ERROR,
				(errcode(ERRCODE_WRONG_OBJECT_TYPE),
				 errmsg("\"%s\" is not a buffer", RelationGetRelationName(rel)),
				 errhint("A buffer is a foreign table of the extension \"%s\".",
						 "statbuffer")));

	if (buffer == NULL)
	{
		buffer = hash_search(buffers, &relid, HASH_ENTER, NULL);
		memset((char *) buffer + sizeof(Oid), 0,
			   sizeof(SbBuffer) - sizeof(Oid));
	}
	build(buffer, rel, lock);
	relation_close(rel, NoLock);
	return buffer;
}

/*
 * Lock a relation and open it as a buffer.  The lock is held to the end of the
 * transaction.  With NoLock, the caller must already hold one.
 *
 * Raises an error if the relation is gone or is not a buffer, or in a parallel
 * worker.
 */
SbBuffer *
buffer_open(Oid relid, LOCKMODE lockmode)
{
	/* this also accepts invalidation messages */
	if (lockmode != NoLock)
		LockRelationOid(relid, lockmode);
	return buffer_open_locked(relid, LockRelationOid);
}

/*
 * Take a lock to the end of the (sub)transaction, because what is counted
 * under it lasts as long.  The running code may belong to a cursor, whose own
 * locks are released if a later subtransaction fails that has used the cursor.
 *
 * On error CurrentResourceOwner stays changed; the code that handles the error
 * restores it.
 */
void
buffer_lock_for_transaction(Oid relid, LOCKMODE lockmode)
{
	ResourceOwner owner = CurrentResourceOwner;

	CurrentResourceOwner = CurTransactionResourceOwner;
	LockRelationOid(relid, lockmode);
	CurrentResourceOwner = owner;
}

/* Lock and open a buffer.  Raises an error if it does not accept increments. */
static SbBuffer *
lock_and_open(Oid relid)
{
	SbBuffer   *buffer;

	buffer_lock_for_transaction(relid, RowExclusiveLock);
	buffer = buffer_open_locked(relid, buffer_lock_for_transaction);
	buffer_check_running(buffer);
	return buffer;
}

/*
 * Can a buffer be opened to count as it is, once it is locked?  `userid' is the
 * user whose INSERT privilege must be known, or InvalidOid.
 */
static inline bool
is_known(const SbBuffer *buffer, Oid userid)
{
	return buffer->valid && buffer->shape->nrow_types == 0 &&
		(!OidIsValid(userid) || buffer->incrementer == userid);
}

/*
 * Lock a buffer that the cache knows, as buffer_lock_for_transaction() does.
 * With `accept', accept invalidations even if the transaction has the lock
 * already: it keeps the definition as it is, but not the privileges.
 */
static inline void
lock_known(const SbBuffer *buffer, bool accept)
{
	ResourceOwner owner = CurrentResourceOwner;
	LOCKTAG		tag;

	/* a foreign table is not a shared catalog */
	SET_LOCKTAG_RELATION(tag, MyDatabaseId, buffer->relid);
	CurrentResourceOwner = CurTransactionResourceOwner;
	accept |= LockAcquire(&tag, RowExclusiveLock, false, false) !=
		LOCKACQUIRE_ALREADY_CLEAR;
	CurrentResourceOwner = owner;
	if (accept)
		AcceptInvalidationMessages();
}

/*
 * Open a buffer to count in it, with RowExclusiveLock to the end of the
 * (sub)transaction.  With `check_privilege', the current user must have the
 * INSERT privilege; the result of the check is cached.  That the privilege was
 * revoked a moment ago is noticed: the caller need not accept invalidations.
 *
 * Raises the errors of buffer_check_privilege(), buffer_open() and
 * buffer_check_running().
 */
SbBuffer *
buffer_open_to_count(Oid relid, bool check_privilege)
{
	Oid			userid = check_privilege ? GetUserId() : InvalidOid;
	SbBuffer   *buffer = find_buffer(relid);
	uint64		asked;

	/*
	 * In most cases nothing has changed since the last transaction.  Look
	 * before the lock is taken, so that users cannot lock relations on which
	 * they have no privileges, and again under the lock.
	 */
	if (likely(buffer != NULL && is_known(buffer, userid)))
	{
		/* buffer_open_locked() lets no parallel worker know one */
		Assert(!IsParallelWorker());
		lock_known(buffer, check_privilege);
		if (likely(is_known(buffer, userid)))
		{
			buffer_check_running(buffer);
			return buffer;
		}
	}

	if (!check_privilege)
		return lock_and_open(relid);
	asked = buffer_generation;
	buffer_check_privilege(relid, ACL_INSERT);
	buffer = lock_and_open(relid);
	note_incrementer(buffer, userid, asked);
	return buffer;
}

/*
 * Keep this session from altering an open buffer or its row types while user
 * code runs.  Locks keep other sessions from doing so, but not this one; open
 * relations do.  Call buffer_end_use() afterwards, unless the (sub)transaction
 * is rolled back.
 *
 * The row types are locked again, because the existing locks may belong to a
 * cursor that is closed earlier.
 */
void
buffer_begin_use(SbBuffer *buffer, BufferUse *use)
{
	const BufferShape *shape = buffer->shape;

	use->rel = relation_open(buffer->relid, NoLock);
	use->nrow_types = shape->nrow_types;
	use->row_types = NULL;
	if (shape->nrow_types > 0)
		use->row_types = palloc(shape->nrow_types * sizeof(Relation));
	for (int i = 0; i < shape->nrow_types; i++)
		use->row_types[i] = relation_open(shape->row_types[i],
										  AccessShareLock);
}

/* End what buffer_begin_use() has begun.  Keeps the locks. */
void
buffer_end_use(BufferUse *use)
{
	for (int i = 0; i < use->nrow_types; i++)
		relation_close(use->row_types[i], NoLock);
	if (use->row_types != NULL)
		pfree(use->row_types);
	relation_close(use->rel, NoLock);
}

/* Open the row types of an older shape, and lock them.  False if one is gone. */
static bool
open_row_types(OlderShape *older, List *row_types, BufferLocker lock)
{
	Oid		   *relids = row_type_relations(row_types);
	int			n = list_length(row_types);

	older->row_types = palloc((n + 1) * sizeof(Relation));
	older->nrow_types = 0;
	for (int i = 0; i < n; i++)
	{
		Relation	rel;

		lock(relids[i], AccessShareLock);
		rel = try_relation_open(relids[i], NoLock);
		if (rel == NULL)
			return false;
		older->row_types[older->nrow_types++] = rel;
	}
	return true;
}

/*
 * Open a shape that keys of an open and attached buffer have, to read them as
 * what they were counted: `desc' is NULL if that is not possible, because a type
 * is gone, or a row type was altered.  `lock' is used to lock row types, which
 * are kept as they are until buffer_close_older(), as in buffer_begin_use().  The
 * memory is of the current context.
 */
void
buffer_open_older(const SbBuffer *buffer, int number, BufferLocker lock,
				  OlderShape *older)
{
	memset(older, 0, sizeof(OlderShape));
	older->keys = table_copy_shape(&buffer->shared->table, number);
	for (;;)
	{
		TupleDesc	desc = shape_make_desc(older->keys);
		List	   *row_types;
		List	   *locked;

		if (desc == NULL)
			return;
		(void) shape_describe(desc, NULL, &row_types);
		if (!open_row_types(older, row_types, lock))
			return;

		/* they may have been altered before we locked them */
		if (shape_can_read(shape_describe(desc, NULL, &locked), older->keys))
		{
			if (!equal(row_types, locked))
			{
				buffer_close_older(older);
				continue;
			}
			older->desc = desc;
		}
		return;
	}
}

/* Close what buffer_open_older() has opened.  Keeps the locks. */
void
buffer_close_older(OlderShape *older)
{
	while (older->nrow_types > 0)
		relation_close(older->row_types[--older->nrow_types], NoLock);
	older->desc = NULL;
}

/*
 * Reread the definition if the transaction, which holds a lock on the
 * relation, may have altered it.  Returns false if it has dropped the
 * relation.  Raises an error if the relation no longer has the columns of a
 * buffer.
 */
bool
buffer_revalidate(SbBuffer *buffer)
{
	Relation	rel;

	if (buffer->valid)
		return true;
	rel = try_relation_open(buffer->relid, NoLock);
	if (rel == NULL)
		return false;
	build(buffer, rel, LockRelationOid);
	relation_close(rel, NoLock);
	return true;
}

/*
 * Raise an error if the buffer no longer has the given shape because the
 * transaction has altered its columns, or dropped their types.
 */
void
buffer_check_shape(SbBuffer *buffer, const BufferShape *shape)
{
	if (likely(buffer->shape == shape) ||
		shape_equal(buffer->shape->keys, shape->keys))
		return;
	ereport(ERROR,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("key columns of buffer \"%s\" were changed by the transaction that uses them",
					NameStr(buffer->name)),
			 errhint("Change the columns in a transaction of its own.")));
}

static void
set_settings(BufferSettings *settings, Oid owner, bool created,
			 const BufferOptions *options)
{
	settings->owner = owner;
	settings->stopped = options->stopped;
	settings->provisional = created;
	settings->durable = options->durable;
	settings->interval = (int64) options->interval * 1000;
	settings->jitter = (int64) options->jitter * 1000;
	settings->max_memory = (uint64) options->max_memory * 1024;
}

/* Extract from the definition what shared memory keeps. */
void
buffer_get_settings(const SbBuffer *buffer, BufferSettings *settings)
{
	set_settings(settings, buffer->owner, buffer->created, &buffer->options);
}

/*
 * Likewise, from a relation that the caller has locked, whatever its columns
 * are.  Returns false if it is not a buffer.  Takes no lock, caches nothing.
 */
bool
buffer_read_settings(Relation rel, BufferSettings *settings)
{
	BufferOptions options;

	if (!buffer_is_relation(rel))
		return false;
	options_parse(GetForeignTable(RelationGetRelid(rel))->options, &options);
	set_settings(settings, rel->rd_rel->relowner,
				 rel->rd_createSubid != InvalidSubTransactionId, &options);
	return true;
}

/* Extract from the definition what its sink needs. */
void
buffer_get_source(const SbBuffer *buffer, SinkSource *source)
{
	source->relid = buffer->relid;
	source->owner = buffer->owner;
	source->options = &buffer->options;
	source->desc = buffer->shape->desc;
	source->count_name = NameStr(buffer->shape->count_name);
}

/*
 * Likewise, from a relation as the transaction sees it now, and options that it
 * may be about to get.  Takes no lock, caches nothing.  Raises an error if the
 * relation does not have the columns of a buffer.
 */
void
buffer_describe(Relation rel, const BufferOptions *options, SinkSource *source)
{
	BufferShape *shape = read_shape(rel);

	source->relid = RelationGetRelid(rel);
	source->owner = rel->rd_rel->relowner;
	source->options = options;
	source->desc = shape->desc;
	source->count_name = NameStr(shape->count_name);
}

/*
 * Raise the error that there is no room for another shape.  Ask the worker to
 * make room, if it can.
 */
static void
report_too_many_shapes(SbBuffer *buffer)
{
	registry_ask(buffer->table_of, REQUEST_RECHECK);
	launch_ensure();
	ereport(ERROR,
			(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
			 errmsg("key columns of buffer \"%s\" were altered too often",
					NameStr(buffer->name)),
			 errdetail("It holds, or held a moment ago, keys of %d shapes.",
					   TABLE_SHAPES),
			 errhint("Try again when they are flushed. Those that no longer fit the key columns are discarded by TRUNCATE.")));
}

/*
 * Find the shared part of an open buffer, or create it if `create' is set;
 * NULL if there is none.
 *
 * Also puts this session's view of the definition into force, unless the
 * transaction has altered the buffer and may yet roll back.  Only a session
 * that is about to count (`create') knows the whole definition: sb_start() and
 * sb_stop() do not wait for sessions that only read.
 */
static SharedBuffer *
find_shared(SbBuffer *buffer, bool create)
{
	SharedBuffer *shared;

	if (!registry_attach(create))
		return NULL;
	if (create)
	{
		BufferSettings settings;
		bool		made;

		buffer_get_settings(buffer, &settings);
		shared = registry_make(MyDatabaseId, buffer->relid, &settings, &made);
		if (made)
			ddl_note_made(shared);
		else if (!ddl_has_altered(shared))
			registry_set(shared, &settings);
	}
	else
	{
		shared = registry_find(MyDatabaseId, buffer->relid);
		if (shared != NULL && !ddl_has_altered(shared))
			registry_set_owner(shared, buffer->owner);
	}
	return shared;
}

/*
 * If the key columns were altered by a session that had not loaded the library,
 * nobody knows of it: ask the worker to convert what is held.
 */
static void
ask_to_convert(SbBuffer *buffer)
{
	if (!registry_is_converted(buffer->shared, &buffer->table) &&
		!ddl_has_altered(buffer->shared) &&
		table_has_unreadable(&buffer->shared->table, &buffer->table))
		registry_ask(buffer->shared, REQUEST_RECHECK);
}

/*
 * Find the shared part of an open buffer, or create it if `create' is set, and
 * the number of its shape.  Returns false if there is none.  If there is no
 * number for the shape, the table's is TABLE_SHAPES.
 */
static bool
attach(SbBuffer *buffer, bool create)
{
	space_detach_removed();
	if (buffer_is_attached(buffer))
		return true;

	/* one that only reads need not have all of it */
	if (!create && buffer->shared != NULL &&
		buffer->table.number == buffer->shared->table.number &&
		buffer->table.shapes_number == buffer->shared->table.shapes_number)
		return true;

	/* a session that has only read has not put the definition into force */
	if (buffer->shared == NULL || (create && !buffer->in_force))
	{
		SharedBuffer *shared = find_shared(buffer, create);

		if (shared == NULL)
			return false;

		/* it may belong to another relation with the same OID */
		if (buffer->table_of != shared)
			table_detach(&buffer->table);
		buffer->table_of = shared;
		buffer->in_force = create;
	}

	/*
	 * The lock on the relation keeps out sessions that see another shape or
	 * owner.
	 */
	table_find_shape(&buffer->table_of->table, buffer->shape->keys, create,
					 create, &buffer->table);
	table_attach(&buffer->table_of->table, &buffer->table);
	buffer->shared = buffer->table_of;
	ask_to_convert(buffer);
	return true;
}

/*
 * Wait until what is counted in an open buffer is in memory: all that is up to a
 * position in its table.  While this session keeps others from counting, the
 * ledger of a durable buffer cannot be loaded, and what it has is not seen: then
 * it is warned.
 */
static void
await_counts(SbBuffer *buffer, uint64 position)
{
	LOCKTAG		tag;

	(void) launch_await_load(buffer->relid, position);
	if (likely(!buffer->options.durable))
		return;
	buffer_set_relation_tag(&tag, buffer->relid);
	(void) launch_await_ledger(buffer->relid,
							   compat_lock_held_or_stronger(&tag, ShareLock));
}

/*
 * Attach to the shared part of an open buffer.  With `create', for callers
 * that are about to count, it is created if necessary.  Without, for callers
 * that want to see what is counted, this waits for saved counts to be loaded,
 * and returns false if there is nothing.
 *
 * Raises an error if memory is out, or with `create' if the columns were
 * altered too often.
 */
bool
buffer_attach(SbBuffer *buffer, bool create)
{
	if (!create)
		await_counts(buffer, LAUNCH_ALL_KEYS);
	if (!attach(buffer, create))
		return false;
	if (create && buffer->table.shape == TABLE_SHAPES)
		report_too_many_shapes(buffer);
	return true;
}

/*
 * Likewise, for a caller that wants to see what is counted for one key: does not
 * wait for others that are still being loaded.
 */
bool
buffer_attach_for_key(SbBuffer *buffer, const KeyBytes *key)
{
	await_counts(buffer, table_position(key));
	return attach(buffer, false);
}

/*
 * Attach to the shared part of an open buffer if it has one, without waiting
 * for anything: for callers that want to know whether there is room for keys, or
 * have waited for what they need.  Returns false if there is none.
 */
bool
buffer_look_up(SbBuffer *buffer)
{
	return attach(buffer, false);
}

/*
 * Attach to the shared part, or create it, for the buffer's worker, which must
 * continue if there are too many shapes: it flushes the keys that have them.
 */
void
buffer_attach_worker(SbBuffer *buffer)
{
	(void) attach(buffer, true);
}

/*
 * Has the transaction altered columns of a relation, not counting those made
 * by the (sub)transaction `creator'?
 */
static bool
has_altered_columns(Oid relid, TransactionId creator)
{
	for (AttrNumber attno = 1;; attno++)
	{
		HeapTuple	tuple;
		TransactionId xmin;

		tuple = SearchSysCache2(ATTNUM, ObjectIdGetDatum(relid),
								Int16GetDatum(attno));
		if (!HeapTupleIsValid(tuple))
			return false;
		xmin = HeapTupleHeaderGetXmin(tuple->t_data);
		ReleaseSysCache(tuple);
		if (xmin != creator && TransactionIdIsCurrentTransactionId(xmin))
			return true;
	}
}

/*
 * Raise an error if the key columns that the transaction sees may be rolled
 * back.  Called before counts are published ahead of the commit: otherwise
 * keys would be held with a shape that no other session ever sees.
 */
void
buffer_check_settled(SbBuffer *buffer)
{
	TransactionId creator = InvalidTransactionId;
	HeapTuple	tuple;
	bool		altered;

	/* a transaction without an XID has altered nothing */
	if (!TransactionIdIsValid(GetTopTransactionIdIfAny()))
		return;

	/* if its creation is rolled back, so is the whole buffer */
	tuple = SearchSysCache2(ATTNUM, ObjectIdGetDatum(buffer->relid),
							Int16GetDatum(TableOidAttributeNumber));
	if (HeapTupleIsValid(tuple))
	{
		creator = HeapTupleHeaderGetXmin(tuple->t_data);
		ReleaseSysCache(tuple);
	}
	altered = has_altered_columns(buffer->relid, creator);
	for (int i = 0; i < buffer->shape->nrow_types && !altered; i++)
		altered = has_altered_columns(buffer->shape->row_types[i], creator);
	if (altered)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("cannot increment buffer \"%s\" asynchronously in a transaction that has altered its columns",
						NameStr(buffer->name)),
				 errdetail("The increment would stay if the transaction, and with it the columns, were rolled back."),
				 errhint("Commit first, or use sb_increment().")));
}

/* Raise an error if the buffer does not accept increments. */
void
buffer_check_running(SbBuffer *buffer)
{
	if (RecoveryInProgress())
		ereport(ERROR,
				(errcode(ERRCODE_READ_ONLY_SQL_TRANSACTION),
				 errmsg("cannot increment during recovery"),
				 errhint("Connect to the primary server.")));
	if (!IsUnderPostmaster)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("cannot increment in single-user mode"),
				 errdetail("There is no process that would flush or save the counts.")));
	if (buffer->options.stopped)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("buffer \"%s\" is stopped", NameStr(buffer->name)),
				 errhint("Call sb_start() to start it.")));
}
