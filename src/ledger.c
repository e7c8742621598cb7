/*-------------------------------------------------------------------------
 *
 * ledger.c
 *	  The ledger of a database's durable buffers: its tables.
 *
 * What committed transactions have counted in durable buffers and is not stored
 * yet is in the ledger, and so survives a crash.  doc/internals.md has the
 * protocol.  This room finds the tables, appends rows, and reads them.
 *
 * The tables are materialized views, which nobody can write to, or read, by SQL.
 * So privileges, triggers, publications and read-only transactions do not come
 * in.  We use the heap's functions.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/heapam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "access/xact.h"
#include "access/xlog.h"
#include "catalog/indexing.h"
#include "catalog/namespace.h"
#include "catalog/pg_extension.h"
#include "compat.h"
#include "key.h"
#include "ledger.h"
#include "miscadmin.h"
#include "packed.h"
#include "pgstat.h"
#include "settings.h"
#include "storage/lmgr.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"

/* the columns of a ledger, and of what was prepared */
#define LEDGER_EPOCH		1
#define LEDGER_INCARNATION	2
#define LEDGER_BODY			3
#define LEDGER_NATTS		3

/* the columns of sb_ledger_epochs */
#define EPOCH_NUMBER		1
#define EPOCH_BUFFER		2
#define EPOCH_SHAPE			3
#define EPOCH_NATTS			3

#define PACKED_KEY_MAX(len) \
	(sizeof(uint16) + PACKED_NUMBER_MAX + KEY_LENGTH(len))

COMPAT_FUNCTION_INFO_V1(sb_ledger_rows);

/* the tables of this database, if they were found */
static LedgerTables found;

static dshash_table *databases = NULL;
static SharedDatabase *my_database = NULL;

/* ------------------------------------------------------------------------
 * Finding
 * ------------------------------------------------------------------------
 */

/* Relation cache callback: the tables may be gone, or others. */
static void
invalidate(Datum arg, Oid relid)
{
	if (!OidIsValid(relid) || relid == found.ledgers[0] ||
		relid == found.ledgers[1] || relid == found.prepared ||
		relid == found.epochs)
		found.epochs = InvalidOid;
}

/* Set up this room.  Called once, when the module is loaded. */
void
ledger_init(void)
{
	CacheRegisterRelcacheCallback(invalidate, (Datum) 0);
}

/* Get a random number that is not 0, or raise an error. */
static uint64
random_number(void)
{
	uint64		number;

	do
	{
		if (!pg_strong_random(&number, sizeof(number)))
			ereport(ERROR,
					(errcode(ERRCODE_INTERNAL_ERROR),
					 errmsg("could not generate a random number")));
	} while (number == 0);
	return number;
}

/* Look up the extension that the ledger is of.  Returns false if it is not there. */
bool
ledger_find_extension(LedgerExtension *extension)
{
	Relation	rel = table_open(ExtensionRelationId, AccessShareLock);
	ScanKeyData key;
	SysScanDesc scan;
	HeapTuple	tuple;
	bool		is_there;

	ScanKeyInit(&key, Anum_pg_extension_extname, BTEqualStrategyNumber, F_NAMEEQ,
				CStringGetDatum("statbuffer"));
	scan = systable_beginscan(rel, ExtensionNameIndexId, true, NULL, 1, &key);
	tuple = systable_getnext(scan);
	is_there = HeapTupleIsValid(tuple);
	if (is_there)
	{
		Form_pg_extension form = (Form_pg_extension) GETSTRUCT(tuple);

		extension->schema = form->extnamespace;
		extension->owner = form->extowner;
	}
	systable_endscan(scan);
	table_close(rel, AccessShareLock);
	return is_there;
}

/*
 * Find the tables of this database.  If the extension is not there, returns false
 * with `missing_ok', and otherwise raises an error.
 */
bool
ledger_find_tables(LedgerTables *tables, bool missing_ok)
{
	if (unlikely(!OidIsValid(found.epochs)))
	{
		LedgerExtension extension;
		bool		is_there = ledger_find_extension(&extension);

		if (is_there)
		{
			Oid			schema = extension.schema;

			found.ledgers[0] = get_relname_relid("sb_ledger_0", schema);
			found.ledgers[1] = get_relname_relid("sb_ledger_1", schema);
			found.prepared = get_relname_relid("sb_ledger_prepared", schema);
			found.epochs = get_relname_relid("sb_ledger_epochs", schema);
		}
		if (!is_there || !OidIsValid(found.ledgers[0]) ||
			!OidIsValid(found.ledgers[1]) || !OidIsValid(found.prepared))
			found.epochs = InvalidOid;
	}
	if (!OidIsValid(found.epochs))
	{
		if (missing_ok)
			return false;
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_TABLE),
				 errmsg("the ledger of durable buffers is missing"),
				 errhint("Drop and create the extension \"%s\".", "statbuffer")));
	}
	*tables = found;
	return true;
}

/* Attach to the table of databases, or with `create' make it. */
static bool
attach_databases(bool create)
{
	if (likely(databases != NULL))
		return true;
	if (!shmem_attach(create))
		return false;
	databases = shmem_attach_table(&shared_control->databases, sizeof(Oid),
								   sizeof(SharedDatabase), create);
	return databases != NULL;
}

/*
 * Get what processes share of a database, or with `create' make it; otherwise
 * returns NULL if it is not there.  The result stays valid as long as somebody
 * is connected to the database, or for the launcher, who removes it.  Raises an
 * error if memory is out.
 */
SharedDatabase *
ledger_database(Oid dboid, bool create)
{
	SharedDatabase *database;
	uint64		incarnation = 0;
	bool		is_there = true;

	if (likely(my_database != NULL && dboid == MyDatabaseId))
		return my_database;
	if (!attach_databases(create))
		return NULL;

	if (create)
	{
		/* first, because it can fail */
		incarnation = random_number();
		database = dshash_find_or_insert(databases, &dboid, &is_there);
	}
	else
		database = dshash_find(databases, &dboid, false);
	if (database == NULL)
		return NULL;
	if (!is_there)
	{
		database->incarnation = incarnation;
		database->keeper = 0;
		database->latch = NULL;
		database->start_after = 0;
		database->start_failures = 0;
		database->logged_at = 0;
		for (int i = 0; i < LEDGER_TASKS; i++)
		{
			database->tasks[i].not_before = 0;
			database->tasks[i].again_at = LEDGER_NEVER;
			database->tasks[i].failures = 0;
		}
		pg_atomic_init_u32(&database->current, 0);
		pg_atomic_init_u32(&database->loaded, 0);
		pg_atomic_init_u32(&database->wants, 0);
		pg_atomic_init_u32(&database->nleft, 0);
		pg_atomic_init_u64(&database->nrounds, 0);
		pg_atomic_init_u64(&database->rotate_at, 0);
		ConditionVariableInit(&database->cv);
	}
	dshash_release_lock(databases, database);
	if (dboid == MyDatabaseId)
		my_database = database;
	return database;
}

/* Begin a walk through all databases; there may be none. */
bool
ledger_begin_walk(dshash_seq_status *walk)
{
	if (!attach_databases(false))
		return false;
	dshash_seq_init(walk, databases, true);
	return true;
}

/*
 * Want something of the keeper of this database.  Takes no lock, cannot fail
 * once ledger_database() has made it.
 */
void
ledger_want(uint32 what)
{
	SharedDatabase *database = my_database;

	if ((pg_atomic_read_u32(&database->wants) & what) == what)
		return;
	(void) pg_atomic_fetch_or_u32(&database->wants, what);
	ledger_wake(database);
}

/* The size in bytes from which a ledger is to be rotated. */
uint64
ledger_rotation_size(SharedDatabase *database)
{
	return Max(pg_atomic_read_u64(&database->rotate_at),
			   (uint64) statbuffer_ledger_size * 1024);
}

/* Wake the keeper of a database, or the launcher, who starts one. */
void
ledger_wake(SharedDatabase *database)
{
	Latch	   *latch = *(Latch *volatile *) &database->latch;

	if (latch != NULL)
		SetLatch(latch);
	else
		launcher_slot_wake();
}

/* ------------------------------------------------------------------------
 * The keeper's slot
 * ------------------------------------------------------------------------
 */

/*
 * Become the keeper of this database.  Returns false if it has one.  Raises an
 * error if memory is out.  Takes SharedControl.lock.
 */
bool
ledger_claim_keeper(void)
{
	SharedDatabase *database = ledger_database(MyDatabaseId, true);
	bool		claimed = false;

	LWLockAcquire(&shared_control->lock, LW_EXCLUSIVE);
	database->start_failures = 0;
	database->start_after = 0;
	if (database->keeper == 0)
	{
		database->keeper = MyProcPid;
		database->latch = MyLatch;
		claimed = true;
	}
	LWLockRelease(&shared_control->lock);
	return claimed;
}

/*
 * Cease to be the keeper, if this process is, and wake the launcher, which looks
 * whether another one is needed.  Takes SharedControl.lock.
 */
void
ledger_release_keeper(void)
{
	SharedDatabase *database = my_database;

	if (database == NULL || database->keeper != MyProcPid)
		return;
	LWLockAcquire(&shared_control->lock, LW_EXCLUSIVE);
	database->keeper = 0;
	database->latch = NULL;
	LWLockRelease(&shared_control->lock);
	launcher_slot_wake();
}

/* Start no keeper of a database before `when'.  Takes SharedControl.lock. */
void
ledger_start_keeper_after(SharedDatabase *database, ClockTime when)
{
	LWLockAcquire(&shared_control->lock, LW_EXCLUSIVE);
	database->start_after = when;
	LWLockRelease(&shared_control->lock);
}

/*
 * Wake the keeper of a database, so that it looks whether it must leave.  Returns
 * whether there is one.  Locks a partition of the table of databases.
 */
bool
ledger_evict_keeper(Oid dboid)
{
	SharedDatabase *database;
	bool		found;

	if (!attach_databases(false))
		return false;
	database = dshash_find(databases, &dboid, false);
	if (database == NULL)
		return false;
	found = *(volatile pid_t *) &database->keeper != 0;
	if (found)
		ledger_wake(database);
	dshash_release_lock(databases, database);
	return found;
}

/* ------------------------------------------------------------------------
 * Epochs
 * ------------------------------------------------------------------------
 */

/*
 * Read the epochs of a buffer, or if `relid' is InvalidOid, of all, as they are
 * now, whatever the transaction's snapshot is.  Those of a buffer on which the
 * caller has a lock stay as they are.  The result is in the current memory
 * context.
 */
List *
ledger_read_epochs(Oid relid)
{
	LedgerTables tables;
	Relation	rel;
	Snapshot	snapshot;
	TableScanDesc scan;
	HeapTuple	tuple;
	ScanKeyData key;
	List	   *epochs = NIL;

	ledger_find_tables(&tables, false);
	rel = table_open(tables.epochs, AccessShareLock);
	ScanKeyInit(&key, EPOCH_BUFFER, BTEqualStrategyNumber, F_OIDEQ,
				ObjectIdGetDatum(relid));

	/*
	 * SnapshotSelf is as good as any where nobody updates, and leaves no
	 * predicate locks.  The other one is for shapes that are toasted.
	 */
	snapshot = RegisterSnapshot(GetCatalogSnapshot(tables.epochs));
	scan = compat_beginscan(rel, SnapshotSelf, OidIsValid(relid) ? 1 : 0, &key);
	while ((tuple = heap_getnext(scan, ForwardScanDirection)) != NULL)
	{
		LedgerEpoch *epoch = palloc(sizeof(LedgerEpoch));
		Datum		values[EPOCH_NATTS];
		bool		isnull[EPOCH_NATTS];
		bytea	   *shape;

		heap_deform_tuple(tuple, RelationGetDescr(rel), values, isnull);
		shape = DatumGetByteaPCopy(values[EPOCH_SHAPE - 1]);
		epoch->number = (uint64) DatumGetInt64(values[EPOCH_NUMBER - 1]);
		epoch->relid = DatumGetObjectId(values[EPOCH_BUFFER - 1]);
		epoch->shape = (KeyShape *) VARDATA(shape);
		epoch->tid = tuple->t_self;
		if (!shape_is_valid(epoch->shape, VARSIZE(shape) - VARHDRSZ))
			ereport(ERROR,
					(errcode(ERRCODE_DATA_CORRUPTED),
					 errmsg("invalid shape of keys in the ledger, of buffer %u",
							epoch->relid)));
		epochs = lappend(epochs, epoch);
	}
	table_endscan(scan);
	UnregisterSnapshot(snapshot);
	table_close(rel, AccessShareLock);
	return epochs;
}

/* List the relations of epochs, in order, each once. */
List *
ledger_list_relations(List *epochs)
{
	List	   *relids = NIL;
	ListCell   *lc;

	foreach(lc, epochs)
		relids = lappend_oid(relids, ((LedgerEpoch *) lfirst(lc))->relid);
	list_sort(relids, list_oid_cmp);
	list_deduplicate_oid(relids);
	return relids;
}

/* Insert a row.  No value is null. */
static void
insert(Relation rel, Datum *values, int options, ItemPointer tid)
{
	static bool isnull[LEDGER_NATTS] = {false};
	HeapTuple	tuple = heap_form_tuple(RelationGetDescr(rel), values, isnull);

	heap_insert(rel, tuple, GetCurrentCommandId(true),
				options | HEAP_INSERT_NO_LOGICAL, NULL);
	*tid = tuple->t_self;
	heap_freetuple(tuple);
}

/*
 * Make an epoch of a buffer, on which the caller has a lock to the end of the
 * transaction.  If it is `frozen', it stays if the transaction rolls back.  The
 * result is in the current memory context.
 */
LedgerEpoch *
ledger_make_epoch(Oid relid, const KeyShape *shape, bool frozen)
{
	LedgerEpoch *epoch = palloc(sizeof(LedgerEpoch));
	bytea	   *copy = palloc(VARHDRSZ + shape->size);
	LedgerTables tables;
	Relation	rel;
	Snapshot	snapshot;
	Datum		values[EPOCH_NATTS];

	SET_VARSIZE(copy, VARHDRSZ + shape->size);
	memcpy(VARDATA(copy), shape, shape->size);
	epoch->relid = relid;
	epoch->shape = (KeyShape *) VARDATA(copy);
	epoch->number = random_number();
	ledger_find_tables(&tables, false);
	rel = table_open(tables.epochs, RowExclusiveLock);
	values[EPOCH_NUMBER - 1] = Int64GetDatum((int64) epoch->number);
	values[EPOCH_BUFFER - 1] = ObjectIdGetDatum(relid);
	values[EPOCH_SHAPE - 1] = PointerGetDatum(copy);

	/* for a shape that is toasted */
	snapshot = RegisterSnapshot(GetCatalogSnapshot(tables.epochs));
	insert(rel, values, frozen ? HEAP_INSERT_FROZEN : 0, &epoch->tid);
	UnregisterSnapshot(snapshot);
	table_close(rel, NoLock);
	CommandCounterIncrement();
	return epoch;
}

/*
 * Delete an epoch: the ledger's rows of it are nobody's.  The caller has
 * AccessExclusiveLock on the buffer.
 */
void
ledger_delete_epoch(const LedgerEpoch *epoch)
{
	LedgerTables tables;
	Relation	rel;
	Snapshot	snapshot;
	ItemPointerData tid = epoch->tid;

	ledger_find_tables(&tables, false);
	rel = table_open(tables.epochs, RowExclusiveLock);

	/* for a shape that is toasted */
	snapshot = RegisterSnapshot(GetCatalogSnapshot(tables.epochs));
	simple_heap_delete(rel, &tid);
	UnregisterSnapshot(snapshot);
	table_close(rel, NoLock);
	CommandCounterIncrement();
}

/* ------------------------------------------------------------------------
 * Appending
 * ------------------------------------------------------------------------
 */

/*
 * Open the current ledger to append to it, with a lock that lasts to the end of
 * the transaction.  With `at_once', for increments outside of the transaction,
 * rows are visible at once, whatever becomes of the transaction, and the lock is
 * released by ledger_close().
 */
void
ledger_open_current(LedgerWriter *writer, bool at_once)
{
	SharedDatabase *database = ledger_database(MyDatabaseId, true);

	writer->database = database;
	writer->prepared = false;
	writer->at_once = at_once;
	writer->incarnation = database->incarnation;
	for (;;)
	{
		uint32		current = pg_atomic_read_u32(&database->current);
		LedgerTables tables;
		Oid			relid;

		ledger_find_tables(&tables, false);
		relid = tables.ledgers[current];

		/*
		 * Do not wait in line for a ledger that is no longer current: the
		 * keeper has it while it empties it.
		 */
		if (unlikely(!ConditionalLockRelationOid(relid, RowExclusiveLock)))
		{
			if (pg_atomic_read_u32(&database->current) != current)
				continue;
			LockRelationOid(relid, RowExclusiveLock);
		}

		/* whoever has the lock keeps the ledger from being emptied */
		if (likely(pg_atomic_read_u32(&database->current) == current))
		{
			writer->rel = table_open(relid, NoLock);
			break;
		}
		UnlockRelationOid(relid, RowExclusiveLock);
	}

	/*
	 * heap_insert() counts rows when they are in the table, and may have to
	 * allocate memory for that.  If there is none, find that out before.
	 */
	pgstat_count_heap_insert(writer->rel, 0);
}

/* Open the table of what prepared transactions have counted. */
void
ledger_open_prepared(LedgerWriter *writer)
{
	LedgerTables tables;

	ledger_find_tables(&tables, false);
	writer->rel = table_open(tables.prepared, RowExclusiveLock);
	writer->database = NULL;
	writer->prepared = true;
	writer->at_once = false;
	writer->incarnation = 0;
}

/* Begin to put keys of an epoch together. */
void
ledger_begin_body(LedgerBody *body, uint64 epoch)
{
	body->epoch = epoch;
	body->used = VARHDRSZ;
}

/* Append the keys that were put together, if there are any. */
void
ledger_end_body(LedgerWriter *writer, LedgerBody *body)
{
	Datum		values[LEDGER_NATTS];
	ItemPointerData tid;

	if (body->used == VARHDRSZ)
		return;
	SET_VARSIZE(body->data, body->used);
	values[LEDGER_EPOCH - 1] = Int64GetDatum((int64) body->epoch);
	values[LEDGER_INCARNATION - 1] = Int64GetDatum((int64) writer->incarnation);
	values[LEDGER_BODY - 1] = PointerGetDatum(body->data);
	insert(writer->rel, values, writer->at_once ? HEAP_INSERT_FROZEN : 0, &tid);
	body->used = VARHDRSZ;
	if (!writer->prepared &&
		unlikely((uint64) ItemPointerGetBlockNumber(&tid) * BLCKSZ >=
				 ledger_rotation_size(writer->database)))
		ledger_want(LEDGER_ROTATE);
}

/* Put a key into a body, which is appended first if that is full. */
void
ledger_put(LedgerWriter *writer, LedgerBody *body, const char *data, uint16 len,
		   int64 count)
{
	char	   *to;

	if (body->used + PACKED_KEY_MAX(len) > LEDGER_BODY_SIZE)
		ledger_end_body(writer, body);
	to = body->data + body->used;
	memcpy(to, &len, sizeof(len));
	to = pack_number(to + sizeof(len), fold_sign(count));
	memcpy(to, data, KEY_LENGTH(len));
	body->used = to + KEY_LENGTH(len) - body->data;
}

/* Append a row as it is.  For one that is damaged, and is kept. */
void
ledger_copy_row(LedgerWriter *writer, const LedgerRow *row)
{
	int			len = row->end - row->next;
	LedgerBody	body;

	if (len > LEDGER_BODY_SIZE - VARHDRSZ)
		elog(ERROR, "row of %d bytes in the ledger of durable buffers", len);
	ledger_begin_body(&body, row->epoch);
	memcpy(body.data + body.used, row->next, len);
	body.used += len;
	ledger_end_body(writer, &body);
}

/* Close a table that was opened to append to it. */
void
ledger_close(LedgerWriter *writer)
{
	table_close(writer->rel, writer->at_once ? RowExclusiveLock : NoLock);

	/* tell the WAL writer, as for a transaction that commits asynchronously */
	if (writer->at_once)
		XLogSetAsyncXactLSN(XactLastRecEnd);
}

/* ------------------------------------------------------------------------
 * Reading
 * ------------------------------------------------------------------------
 */

/*
 * Parse the next key of a row that is not at its end.  Returns false if it is
 * damaged.
 */
static bool
parse_key(LedgerRow *row, LedgerKey *key)
{
	const char *from = row->next;
	uint64		count;

	if (row->end - from < sizeof(key->len))
		return false;
	memcpy(&key->len, from, sizeof(key->len));
	from = unpack_number(from + sizeof(key->len), row->end, &count);
	if (from == NULL || KEY_LENGTH(key->len) > KEY_MAX_SIZE ||
		KEY_LENGTH(key->len) > row->end - from)
		return false;
	key->count = unfold_sign(count);
	key->data = from;
	row->next = from + KEY_LENGTH(key->len);
	return true;
}

/* Can all keys of a row be read? */
static bool
is_readable(LedgerRow row)
{
	LedgerKey	key;

	while (row.next != row.end)
		if (!parse_key(&row, &key))
			return false;
	return true;
}

/*
 * Visit the rows of one of the tables, which the caller has opened, that a
 * snapshot sees.  The row is valid during the call.  One that is damaged is
 * logged; it has no keys then, so that no part of it is counted.
 */
void
ledger_scan(Relation rel, Snapshot snapshot, LedgerVisitor visit, void *arg)
{
	TableScanDesc scan = compat_beginscan(rel, snapshot, 0, NULL);
	HeapTuple	tuple;

	while ((tuple = heap_getnext(scan, ForwardScanDirection)) != NULL)
	{
		Datum		values[LEDGER_NATTS];
		bool		isnull[LEDGER_NATTS];
		LedgerRow	row;
		struct varlena *body;

		CHECK_FOR_INTERRUPTS();
		heap_deform_tuple(tuple, RelationGetDescr(rel), values, isnull);
		body = (struct varlena *) DatumGetPointer(values[LEDGER_BODY - 1]);
		row.epoch = (uint64) DatumGetInt64(values[LEDGER_EPOCH - 1]);
		row.incarnation = (uint64) DatumGetInt64(values[LEDGER_INCARNATION - 1]);
		row.tuple = tuple;
		row.next = VARDATA_ANY(body);
		row.end = row.next + VARSIZE_ANY_EXHDR(body);
		row.damaged = false;
		row.damaged = !is_readable(row);
		if (unlikely(row.damaged))
			ereport(WARNING,
					(errcode(ERRCODE_DATA_CORRUPTED),
					 errmsg("invalid row (%u,%u) in \"%s\", the ledger of durable buffers",
							ItemPointerGetBlockNumber(&tuple->t_self),
							ItemPointerGetOffsetNumber(&tuple->t_self),
							RelationGetRelationName(rel)),
					 errdetail("It is not counted, and is kept.")));
		visit(&row, arg);
	}
	table_endscan(scan);
}

/* Take the next key of a row.  Returns false at the end. */
bool
ledger_next_key(LedgerRow *row, LedgerKey *key)
{
	if (row->damaged || row->next == row->end)
		return false;
	if (!parse_key(row, key))
		elog(ERROR, "invalid row in the ledger of durable buffers");
	return true;
}

static void
report_refresh(void)
{
	ereport(ERROR,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("cannot refresh the ledger of durable buffers"),
			 errdetail("It has counts that are not stored yet.")));
}

/*
 * A materialized view is going to be refreshed.  Raise an error if it is one of
 * ours: WITH NO DATA does not even call sb_ledger_rows().
 */
void
ledger_check_refresh(const RangeVar *name)
{
	LedgerTables tables;
	Oid			relid = RangeVarGetRelid(name, NoLock, true);

	if (OidIsValid(relid) && ledger_find_tables(&tables, true) &&
		(relid == tables.ledgers[0] || relid == tables.ledgers[1] ||
		 relid == tables.prepared || relid == tables.epochs))
		report_refresh();
}

/*
 * sb_ledger_rows(): the query of the materialized views.  Raises an error, so
 * that they are never refreshed.
 */
Datum
sb_ledger_rows(PG_FUNCTION_ARGS)
{
	report_refresh();
	PG_RETURN_NULL();
}
