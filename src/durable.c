/*-------------------------------------------------------------------------
 *
 * durable.c
 *	  Durable buffers: their epochs, and switching "durable" on and off.
 *
 * The option says whether a buffer is durable.  That it is, and since when, is
 * said by its epochs in the ledger: they are made when the option is switched
 * on, and deleted when it is switched off.  Whoever sets options has
 * AccessExclusiveLock to the end of the transaction, and at PRE_COMMIT the
 * epochs are made to agree with the options, whatever statements and
 * savepoints have led to them.  So nobody ever sees one without the other, but
 * the transaction itself.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/relation.h"
#include "access/table.h"
#include "access/xact.h"
#include "access/xlog.h"
#include "catalog/namespace.h"
#include "catalog/pg_foreign_table.h"
#include "catalog/pg_namespace.h"
#include "compat.h"
#include "durable.h"
#include "foreign/foreign.h"
#include "launch.h"
#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "options.h"
#include "recover.h"
#include "savefile.h"
#include "storage/condition_variable.h"
#include "storage/lmgr.h"
#include "utils/acl.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"

/*
 * how long COMMIT PREPARED waits until what was counted is in memory, also if
 * the last time that was in vain, and how often it looks
 */
#define COMMIT_PREPARED_MSECS	1000
#define IN_VAIN_MSECS			100
#define LOOK_AGAIN_MSECS		20

/* the transaction has set options of a foreign table of ours */
static bool options_set = false;

static void
xact_callback(XactEvent event, void *arg)
{
	if (event == XACT_EVENT_COMMIT || event == XACT_EVENT_ABORT ||
		event == XACT_EVENT_PREPARE)
		options_set = false;
}

/* Set up this room.  Called once, when the module is loaded. */
void
durable_init(void)
{
	RegisterXactCallback(xact_callback, NULL);
}

/* ------------------------------------------------------------------------
 * Epochs
 * ------------------------------------------------------------------------
 */

/* Read the epochs of a buffer into its cache entry. */
static void
read_epochs(SbBuffer *buffer)
{
	MemoryContext context = AllocSetContextCreate(CurrentMemoryContext,
												  "statbuffer epochs",
												  ALLOCSET_SMALL_SIZES);
	MemoryContext oldcontext = MemoryContextSwitchTo(context);
	List	   *epochs = ledger_read_epochs(buffer->relid);

	MemoryContextSwitchTo(oldcontext);
	MemoryContextSetParent(context, TopMemoryContext);
	buffer->epochs_context = context;
	buffer->epochs = epochs;
}

/*
 * Has the ledger something of a buffer, which the caller has locked?  The option
 * says so, too, unless the transaction has set it.
 */
bool
durable_has_epochs(Oid relid)
{
	LedgerTables tables;

	return ledger_find_tables(&tables, true) &&
		ledger_read_epochs(relid) != NIL;
}

/*
 * Get the number of the epoch that keys of a shape are counted in, in a buffer
 * that is durable, or has been until this transaction, and that the caller has
 * opened, with a lock to the end of the transaction.  The first one who counts
 * under a new shape makes its epoch.
 */
uint64
durable_epoch(SbBuffer *buffer, const KeyShape *shape)
{
	MemoryContext oldcontext;
	LedgerEpoch *epoch;
	ListCell   *lc;

	if (unlikely(buffer->epochs_context == NULL))
		read_epochs(buffer);
	foreach(lc, buffer->epochs)
	{
		epoch = lfirst(lc);
		if (shape_equal(epoch->shape, shape))
			return epoch->number;
	}

	/*
	 * It stays if the transaction rolls back, as sb_async_increment() may
	 * refer to it.
	 */
	oldcontext = MemoryContextSwitchTo(buffer->epochs_context);
	epoch = ledger_make_epoch(buffer->relid, shape, true);
	buffer->epochs = lappend(buffer->epochs, epoch);
	MemoryContextSwitchTo(oldcontext);
	return epoch->number;
}

/* All sessions must read the epochs of a buffer again, and so must we. */
static void
epochs_changed(Oid relid)
{
	CacheInvalidateRelcacheByRelid(relid);
	CommandCounterIncrement();
}

static void
delete_epochs(List *epochs)
{
	ListCell   *lc;

	foreach(lc, epochs)
		ledger_delete_epoch(lfirst(lc));
}

/*
 * At PRE_COMMIT of a transaction that has truncated a durable buffer: what the
 * ledger has of it is nobody's any more.  Not before, because what savepoints
 * have undone does not count, and neither does whether the buffer was durable
 * when it was truncated: see durable_reconcile(), which comes first.  The caller
 * has AccessExclusiveLock.
 */
void
durable_truncate(SbBuffer *buffer)
{
	const KeyShape *shape = buffer->shape->keys;

	delete_epochs(ledger_read_epochs(buffer->relid));
	(void) ledger_make_epoch(buffer->relid, shape, false);
	epochs_changed(buffer->relid);
}

/* ------------------------------------------------------------------------
 * Dropping the ledger
 * ------------------------------------------------------------------------
 */

/* Who owns a schema? */
static Oid
schema_owner(Oid schema)
{
	HeapTuple	tuple = SearchSysCache1(NAMESPACEOID, ObjectIdGetDatum(schema));
	Oid			owner = InvalidOid;

	if (HeapTupleIsValid(tuple))
	{
		owner = ((Form_pg_namespace) GETSTRUCT(tuple))->nspowner;
		ReleaseSysCache(tuple);
	}
	return owner;
}

/*
 * Whose rights does it take to drop the ledger by this statement?  InvalidOid if
 * it drops something else.
 */
static Oid
dropper(const Node *statement)
{
	LedgerExtension extension;
	ListCell   *lc;

	if (IsA(statement, DropStmt) &&
		((const DropStmt *) statement)->removeType != OBJECT_EXTENSION &&
		((const DropStmt *) statement)->removeType != OBJECT_SCHEMA)
		return InvalidOid;
	if (RecoveryInProgress() || !ledger_find_extension(&extension))
		return InvalidOid;
	if (IsA(statement, DropOwnedStmt))
	{
		foreach(lc, ((const DropOwnedStmt *) statement)->roles)
		{
			Oid			role = get_rolespec_oid(lfirst(lc), true);

			if (OidIsValid(role) && (role == extension.owner ||
									 role == schema_owner(extension.schema)))
				return role;
		}
		return InvalidOid;
	}
	foreach(lc, ((const DropStmt *) statement)->objects)
	{
		const char *name = strVal(lfirst(lc));

		if (((const DropStmt *) statement)->removeType == OBJECT_EXTENSION)
		{
			if (strcmp(name, "statbuffer") == 0)
				return extension.owner;
		}
		else if (get_namespace_oid(name, true) == extension.schema)
			return schema_owner(extension.schema);
	}
	return InvalidOid;
}

/*
 * Before a DROP: if the ledger is dropped, so are all durable buffers, but after
 * it.  Whoever counts or flushes has a buffer locked, and then locks the ledger.
 * So lock the buffers first, or one of them would have to be cancelled.
 */
void
durable_before_drop(const Node *statement)
{
	LedgerTables tables;
	List	   *locked = NIL;
	Oid			role = dropper(statement);
	bool		more;

	/* who may not do it, must not lock anything */
	if (!OidIsValid(role) || !has_privs_of_role(GetUserId(), role) ||
		!ledger_find_tables(&tables, true))
		return;
	do
	{
		List	   *relids;
		ListCell   *lc;

		relids = ledger_list_relations(ledger_read_epochs(InvalidOid));
		relids = list_difference_oid(relids, locked);
		foreach(lc, relids)
			LockRelationOid(lfirst_oid(lc), AccessExclusiveLock);
		more = relids != NIL;
		locked = list_concat(locked, relids);
	} while (more);
}

/* ------------------------------------------------------------------------
 * Prepared transactions
 * ------------------------------------------------------------------------
 */

/* Count rows: a LedgerVisitor. */
static void
count_row(LedgerRow *row, void *arg)
{
	(*(uint32 *) arg)++;
}

/*
 * How many rows are there that a prepared transaction has appended, and has
 * committed?
 */
static uint32
count_prepared(Oid relid)
{
	Relation	rel;
	uint32		n = 0;

	/* a session that drops the extension may have it locked */
	if (!ConditionalLockRelationOid(relid, AccessShareLock))
		return 0;
	rel = try_relation_open(relid, NoLock);
	if (rel == NULL)
	{
		UnlockRelationOid(relid, AccessShareLock);
		return 0;
	}

	/* leaves no predicate lock in a serializable session */
	ledger_scan(rel, SnapshotSelf, count_row, &n);
	relation_close(rel, AccessShareLock);
	return n;
}

/*
 * Is there something that the keeper has not put into memory yet?  What its last
 * sweep has left it cannot: the buffer is locked, or the row cannot be read.
 */
static bool
is_to_be_swept(SharedDatabase *database, Oid prepared)
{
	return count_prepared(prepared) > pg_atomic_read_u32(&database->nleft);
}

/*
 * COMMIT PREPARED has been executed: if the transaction has counted in durable
 * buffers, wait for a while until the keeper has put that into memory, so that
 * the session sees it.  The keeper looks each second by itself.  Where there is
 * none, because the server has no slot for it, a session waits that long once.
 *
 * The transaction has committed, and nobody must be told anything else.  So a
 * request to cancel only ends the wait, as it does while a commit waits for a
 * standby.
 */
void
durable_commit_prepared(void)
{
	static bool in_vain = false;
	LedgerTables tables;
	SharedDatabase *database;
	ClockTime	until;

	HOLD_INTERRUPTS();
	if (ledger_find_tables(&tables, true) && count_prepared(tables.prepared) > 0)
	{
		(void) registry_attach(true);
		database = ledger_database(MyDatabaseId, true);
		launch_ensure();
		until = clock_add(clock_now(),
						  in_vain ? IN_VAIN_MSECS : COMMIT_PREPARED_MSECS);
		ConditionVariablePrepareToSleep(&database->cv);
		ledger_want(LEDGER_SWEEP);
		while ((in_vain = is_to_be_swept(database, tables.prepared)) &&
			   !QueryCancelPending && !ProcDiePending && clock_now() < until)
			(void) ConditionVariableTimedSleep(&database->cv, LOOK_AGAIN_MSECS,
											   compat_wait_event("StatbufferPrepared"));
		ConditionVariableCancelSleep();
		QueryCancelPending = false;
	}
	RESUME_INTERRUPTS();
}

/* ------------------------------------------------------------------------
 * Switching it on and off
 * ------------------------------------------------------------------------
 */

/* What memory has of a portion of a table. */
typedef struct HeldKey
{
	int64		count;
	uint16		len;
	uint8		shape;
} HeldKey;

/* Copy the keys of the next portion.  Returns false at the end. */
static bool
copy_portion(TableScan *scan, StringInfo copy)
{
	SharedCounter *counter;

	resetStringInfo(copy);
	if (!table_begin_portion(scan))
		return false;
	while ((counter = table_next(scan).counter) != NULL)
	{
		HeldKey		held = {
			.len = counter->keylen,
			.shape = counter->shape
		};
		int64		in_flight;

		counter_read(counter, &held.count, &in_flight);
		held.count += in_flight;
		if (held.count == 0)
			continue;
		appendBinaryStringInfo(copy, (char *) &held, sizeof(held));
		appendBinaryStringInfo(copy, counter->key, KEY_LENGTH(counter->keylen));
	}
	return true;
}

/* Append everything that memory has of a buffer to the ledger. */
static void
append_held(SbBuffer *buffer)
{
	LedgerBody *bodies[TABLE_SHAPES] = {NULL};
	LedgerWriter writer;
	StringInfoData copy;
	TableScan	scan;

	initStringInfo(&copy);
	ledger_open_current(&writer, false);
	table_begin_scan(&scan, &buffer->table, false);
	while (copy_portion(&scan, &copy))
	{
		const char *next = copy.data;

		while (next < copy.data + copy.len)
		{
			HeldKey		held;

			CHECK_FOR_INTERRUPTS();
			memcpy(&held, next, sizeof(held));
			next += sizeof(held);
			if (bodies[held.shape] == NULL)
			{
				KeyShape   *shape = table_copy_shape(&buffer->shared->table, held.shape);

				bodies[held.shape] = palloc(sizeof(LedgerBody));
				ledger_begin_body(bodies[held.shape],
								  durable_epoch(buffer, shape));
			}
			ledger_put(&writer, bodies[held.shape], next, held.len, held.count);
			next += KEY_LENGTH(held.len);
		}
	}
	for (int i = 0; i < TABLE_SHAPES; i++)
		if (bodies[i] != NULL)
			ledger_end_body(&writer, bodies[i]);
	ledger_close(&writer);
}

/*
 * A buffer becomes durable.  Nobody else counts in it or flushes, so what is in
 * memory is final, except for saved counts that are still being loaded.
 */
static void
switch_on(Oid relid, bool created)
{
	SbBuffer   *buffer = buffer_open_locked(relid, LockRelationOid);

	(void) ledger_make_epoch(relid, buffer->shape->keys, false);
	epochs_changed(relid);
	recover_settle(relid);
	if (created)
		return;
	if (!launch_await_load(relid, LAUNCH_ALL_KEYS))
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("cannot make buffer \"%s\" durable now",
						NameStr(buffer->name)),
				 errdetail("Counts that were saved when the server was stopped are still being loaded."),
				 errhint("Try again when file \"%s\" no longer exists in the data directory.",
						 SAVED_LOADING_FILE)));
	buffer = buffer_open_locked(relid, LockRelationOid);
	if (buffer_look_up(buffer))
		append_held(buffer);
}

/* Make the epochs of a relation agree with its option. */
static void
reconcile(Relation rel, bool preparing)
{
	Oid			relid = RelationGetRelid(rel);
	bool		created = rel->rd_createSubid != InvalidSubTransactionId;
	List	   *epochs = ledger_read_epochs(relid);
	BufferOptions options;
	const char *problem;

	options_parse(GetForeignTable(relid)->options, &options);

	/* what a former relation with the same OID has left */
	if (created && epochs != NIL && !preparing)
	{
		delete_epochs(epochs);
		epochs = NIL;
	}
	if (options.durable == (epochs != NIL))
		return;
	if (preparing)
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("cannot PREPARE a transaction that has set option \"%s\" of buffer \"%s\"",
						"durable", RelationGetRelationName(rel))));
	if (!options.durable)
	{
		recover_buffer(relid);
		delete_epochs(epochs);
		epochs_changed(relid);
	}

	/* without the columns of a buffer, nothing can be counted in it */
	else if (buffer_find_count(rel, &problem) != InvalidAttrNumber)
		switch_on(relid, created);
}

/*
 * List the foreign tables that the transaction has locked as who alters one
 * does.
 */
static List *
list_locked(void)
{
	Relation	rel = table_open(ForeignTableRelationId, AccessShareLock);
	SysScanDesc scan = systable_beginscan(rel, InvalidOid, false, NULL, 0, NULL);
	HeapTuple	tuple;
	List	   *relids = NIL;

	while (HeapTupleIsValid(tuple = systable_getnext(scan)))
	{
		Oid			relid = ((Form_pg_foreign_table) GETSTRUCT(tuple))->ftrelid;
		LOCKTAG		tag;

		buffer_set_relation_tag(&tag, relid);
		if (compat_lock_held(&tag, AccessExclusiveLock))
			relids = lappend_oid(relids, relid);
	}
	systable_endscan(scan);
	table_close(rel, AccessShareLock);
	return relids;
}

/* The validator has been called: for options that are set, or may be. */
void
durable_note_options(void)
{
	options_set = true;
}

/*
 * Has the transaction switched a buffer on or off, or created a durable one?
 * Then it gets its epochs, or loses them, only when it commits.
 */
bool
durable_is_unsettled(const SbBuffer *buffer)
{
	bool		durable = buffer->options.durable;
	LOCKTAG		tag;

	if (likely(!options_set))
		return false;
	buffer_set_relation_tag(&tag, buffer->relid);
	if (!compat_lock_held(&tag, AccessExclusiveLock))
		return false;
	return (durable && buffer->created) ||
		durable != (ledger_read_epochs(buffer->relid) != NIL);
}

/*
 * At the end of the transaction, make the epochs of the buffers whose options it
 * has set agree with them.  With `preparing', raises an error if they do not:
 * what is appended says that memory has the same, which would not be true any
 * more if the server restarts before COMMIT PREPARED.
 */
void
durable_reconcile(bool preparing)
{
	LedgerTables tables;
	ListCell   *lc;

	if (likely(!options_set) || IsBinaryUpgrade ||
		!ledger_find_tables(&tables, true))
		return;
	foreach(lc, list_locked())
	{
		Relation	rel = try_relation_open(lfirst_oid(lc), NoLock);

		if (rel == NULL)
			continue;
		if (buffer_is_relation(rel))
			reconcile(rel, preparing);
		relation_close(rel, NoLock);
	}
}
