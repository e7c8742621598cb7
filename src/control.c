/*-------------------------------------------------------------------------
 *
 * control.c
 *	  SQL functions that drain, start and stop a buffer.
 *
 * doc/internals.md describes how sb_stop() leaves nothing behind.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/table.h"
#include "access/xact.h"
#include "buffer.h"
#include "catalog/indexing.h"
#include "catalog/objectaccess.h"
#include "catalog/objectaddress.h"
#include "catalog/pg_foreign_table.h"
#include "commands/dbcommands.h"
#include "commands/defrem.h"
#include "compat.h"
#include "create.h"
#include "drain.h"
#include "foreign/foreign.h"
#include "functions.h"
#include "launch.h"
#include "miscadmin.h"
#include "nodes/makefuncs.h"
#include "owner.h"
#include "pending.h"
#include "registry.h"
#include "sink.h"
#include "storage/ipc.h"
#include "storage/lmgr.h"
#include "storage/lock.h"
#include "table.h"
#include "tcop/utility.h"
#include "utils/builtins.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/resowner.h"
#include "utils/syscache.h"
#include "utils/timestamp.h"

COMPAT_FUNCTION_INFO_V1(sb_drain);
COMPAT_FUNCTION_INFO_V1(sb_start);
COMPAT_FUNCTION_INFO_V1(sb_stop);

/*
 * The locks of sb_start() and sb_stop(), which exclude each other.
 * CONTROL_LOCK blocks neither workers nor increments.  STOP_LOCK blocks only
 * increments: it conflicts with their RowExclusiveLock, but not with a
 * worker's RowShareLock.
 */
#define CONTROL_LOCK		ShareUpdateExclusiveLock
#define STOP_LOCK			ShareRowExclusiveLock

/*
 * sb_drain(buffer regclass, timeout interval): flush everything published so
 * far, and wait for it.  Returns false if that takes longer than `timeout';
 * null means no limit.  Warns of failures while it waits, and if the transaction
 * itself has counted in the buffer.
 *
 * The caller must own the buffer.  Takes RowShareLock on it, which is released
 * while waiting: see drain_wait().  Raises an error if the buffer is stopped,
 * or if the worker waits for this transaction, directly or not.
 */
Datum
sb_drain(PG_FUNCTION_ARGS)
{
	Oid			relid = function_buffer_argument(fcinfo, 0);
	SbBuffer   *buffer;
	int64		timeout = -1;
	DrainState	state;
	uint64		nkeys;
	int64		sum;

	if (!PG_ARGISNULL(1))
	{
		Interval   *interval = PG_GETARG_INTERVAL_P(1);
		double		msecs;

		msecs = interval->time / 1000.0 +
			interval->day * (double) SECS_PER_DAY * 1000.0 +
			interval->month * (double) DAYS_PER_MONTH * SECS_PER_DAY * 1000.0;
		if (msecs < 0)
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					 errmsg("timeout must not be negative")));
		timeout = (int64) Min(msecs, (double) INT_MAX * 1000);
	}

	buffer_check_owner(relid);
	function_check_not_standby();
	buffer = buffer_open(relid, RowShareLock);
	buffer_check_running(buffer);
	if (pending_sum(buffer, &nkeys, &sum))
		ereport(WARNING,
				(errmsg("increments of this transaction are not drained"),
				 errdetail_plural("It has counted " INT64_FORMAT " in %llu key of buffer \"%s\", and publishes that when it commits.",
								  "It has counted " INT64_FORMAT " in %llu keys of buffer \"%s\", and publishes that when it commits.",
								  (unsigned long) nkeys,
								  sum, (unsigned long long) nkeys,
								  NameStr(buffer->name))));
	state = drain_wait(buffer, timeout, false, true);
	if (state == DRAIN_STOPPED)
		buffer_check_running(buffer);
	if (state == DRAIN_BLOCKED)
		ereport(ERROR,
				(errcode(ERRCODE_T_R_DEADLOCK_DETECTED),
				 errmsg("cannot drain buffer \"%s\" while another session waits to alter it",
						NameStr(buffer->name)),
				 errdetail("That session waits for this transaction, which has already locked the buffer, and the flush waits for that session."),
				 errhint("Drain the buffer in a transaction of its own.")));
	if (state == DRAIN_DEADLOCK)
		ereport(ERROR,
				(errcode(ERRCODE_T_R_DEADLOCK_DETECTED),
				 errmsg("cannot drain buffer \"%s\" while its handler waits for this transaction",
						NameStr(buffer->name)),
				 errdetail("The handler waits for a lock that this transaction holds, or for a session that waits for this transaction."),
				 errhint("Drain the buffer in a transaction of its own.")));
	PG_RETURN_BOOL(state == DRAIN_DONE);
}

/* ------------------------------------------------------------------------
 * Starting and stopping
 * ------------------------------------------------------------------------
 */

/*
 * Set or clear the option "stopped".  The caller holds CONTROL_LOCK or
 * STOP_LOCK.
 *
 * This does what ALTER FOREIGN TABLE does, except for its AccessExclusiveLock.
 * That would have to wait for transactions that have only read the buffer, and
 * that may go on to count and thus wait for us.  It is not needed: a
 * transaction that counts has either locked the buffer before we have, or sees
 * the option once it has the lock.
 */
static void
set_stopped(SbBuffer *buffer, bool stopped)
{
	ForeignTable *table = GetForeignTable(buffer->relid);
	ForeignServer *server = GetForeignServer(table->serverid);
	Datum		values[Natts_pg_foreign_table] = {0};
	bool		isnull[Natts_pg_foreign_table] = {0};
	bool		replace[Natts_pg_foreign_table] = {0};
	const int	column = Anum_pg_foreign_table_ftoptions - 1;
	bool		given;
	DefElem    *option;
	Relation	catalog;
	HeapTuple	tuple;
	Datum		options;

	/* SET, ADD and DROP depend on whether the option is there */
	given = options_find(table->options, "stopped") != NULL;
	if (!stopped && !given)
		return;
	PreventCommandIfReadOnly("ALTER FOREIGN TABLE");
	option = makeDefElemExtended(NULL, "stopped",
								 stopped ? (Node *) makeString("true") : NULL,
								 !stopped ? DEFELEM_DROP :
								 given ? DEFELEM_SET : DEFELEM_ADD, -1);

	catalog = table_open(ForeignTableRelationId, RowExclusiveLock);
	tuple = SearchSysCacheCopy1(FOREIGNTABLEREL,
								ObjectIdGetDatum(buffer->relid));
	if (!HeapTupleIsValid(tuple))
		elog(ERROR, "cache lookup failed for foreign table %u", buffer->relid);
	options = SysCacheGetAttr(FOREIGNTABLEREL, tuple,
							  Anum_pg_foreign_table_ftoptions,
							  &isnull[column]);
	if (isnull[column])
		options = PointerGetDatum(NULL);
	options = transformGenericOptions(ForeignTableRelationId, options,
									  list_make1(option),
									  GetForeignDataWrapper(server->fdwid)->fdwvalidator);
	values[column] = options;
	isnull[column] = DatumGetPointer(options) == NULL;
	replace[column] = true;
	tuple = heap_modify_tuple(tuple, RelationGetDescr(catalog), values, isnull,
							  replace);
	CatalogTupleUpdate(catalog, &tuple->t_self, tuple);
	CacheInvalidateRelcacheByRelid(buffer->relid);
	InvokeObjectPostAlterHook(ForeignTableRelationId, buffer->relid, 0);
	table_close(catalog, RowExclusiveLock);
	CommandCounterIncrement();
}

/* Raise an error if no worker could connect as the buffer's owner. */
static void
check_owner_can_connect(SbBuffer *buffer)
{
	OwnerInfo	owner;

	if (!compat_may_connect(MyDatabaseId, buffer->owner))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("role \"%s\" does not have CONNECT privilege on database \"%s\"",
						GetUserNameFromId(buffer->owner, false),
						get_database_name(MyDatabaseId)),
				 errdetail("The worker of a buffer connects as the buffer's owner."),
				 errhint("Grant CONNECT on the database to the role, or change the owner of the buffer.")));
	owner_get_info(buffer->owner, &owner);
	if (!owner.may_log_in)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("role \"%s\" is not permitted to log in",
						GetUserNameFromId(buffer->owner, false)),
				 errdetail("The worker of a buffer connects as the buffer's owner."),
				 errhint("Grant the role the LOGIN privilege (it needs no password), or change the owner of the buffer.")));
}

static bool
start_buffer(FunctionCallInfo fcinfo)
{
	Oid			relid;
	SbBuffer   *buffer;
	SinkSource	source;
	OwnerView	saved;

	function_check_not_standby();
	relid = function_find_buffer(fcinfo, 0);
	if (!OidIsValid(relid))
		relid = create_default_buffer(fcinfo);

	buffer_check_owner(relid);
	buffer = buffer_open(relid, CONTROL_LOCK);
	owner_enter(buffer->owner, &saved);
	buffer_get_source(buffer, &source);
	sink_for(source.options)->check(&source);
	owner_leave(&saved);
	check_owner_can_connect(buffer);
	if (buffer->options.stopped)
	{
		LOCKTAG		gate;

		/* a worker that starts before we commit must wait at the gate */
		buffer_set_gate_tag(&gate, relid);
		(void) LockAcquire(&gate, ExclusiveLock, false, false);
		set_stopped(buffer, false);
		buffer = buffer_open(relid, NoLock);
	}
	buffer_attach(buffer, true);
	launch_ensure();
	registry_clear_error(buffer->shared);
	requests_ask(&buffer->shared->requests, REQUEST_RECHECK);
	registry_call_worker(buffer->shared);
	return true;
}

/*
 * Do something whose locks must last as long as its effects, which is as long as
 * the (sub)transaction, even if it is called by a cursor: see
 * buffer_lock_for_transaction().
 */
static bool
do_for_transaction(bool (*action) (FunctionCallInfo), FunctionCallInfo fcinfo)
{
	ResourceOwner owner = CurrentResourceOwner;
	bool		result;

	CurrentResourceOwner = CurTransactionResourceOwner;
	result = action(fcinfo);
	CurrentResourceOwner = owner;
	return result;
}

/*
 * sb_start(buffer regclass): check that a buffer's worker can work, and start
 * the buffer if it is stopped.  Returns true.  Creates the default buffer if that
 * is meant and there is none.
 *
 * The caller must own the buffer.  Takes CONTROL_LOCK on it and, if it is
 * stopped, its gate, both to the end of the (sub)transaction.  Raises an error if
 * the handler cannot be called, the target cannot take the counts, or the owner
 * cannot connect.
 */
Datum
sb_start(PG_FUNCTION_ARGS)
{
	PG_RETURN_BOOL(do_for_transaction(start_buffer, fcinfo));
}

/*
 * The worker need not cancel its work any more: we have the gate, or have
 * given up.
 */
static void
cancel_halt(int code, Datum arg)
{
	SharedBuffer *shared = (SharedBuffer *) DatumGetPointer(arg);

	pg_atomic_write_u64(&shared->requests.halt_at, 0);
}

/*
 * Make the worker cancel its transaction, and keep it from starting another
 * one until this transaction ends.  The caller holds STOP_LOCK.
 */
static void
shut_gate(SharedBuffer *shared)
{
	LOCKTAG		gate;

	registry_set_locktag(&gate, &shared->key, REGISTRY_LOCK_GATE);
	PG_ENSURE_ERROR_CLEANUP(cancel_halt, PointerGetDatum(shared));
	{
		pg_atomic_write_u64(&shared->requests.halt_at, (uint64) clock_now());
		(void) LockAcquire(&gate, ExclusiveLock, false, false);
	}
	PG_END_ENSURE_ERROR_CLEANUP(cancel_halt, PointerGetDatum(shared));
	cancel_halt(0, PointerGetDatum(shared));
}

/*
 * Get what a buffer holds that is not stored yet.  Returns false if there is
 * nothing.
 */
static bool
find_left(SbBuffer *buffer, uint64 *nkeys, int64 *sum)
{
	*nkeys = 0;
	*sum = 0;
	if (buffer_attach(buffer, false))
		table_sum(&buffer->table, TABLE_ALL_SHAPES, nkeys, sum);
	return *nkeys > 0;
}

/*
 * Send the client a NOTICE of what sb_stop() leaves in the buffer.  Returns
 * whether it leaves anything.
 */
static bool
report_left(SbBuffer *buffer)
{
	int			shutdown = buffer->options.shutdown;
	bool		left;
	uint64		nkeys;
	int64		sum;

	left = find_left(buffer, &nkeys, &sum);
	if (left)
		ereport(NOTICE,
				(shutdown > 0 ?
				 errmsg("not everything in buffer \"%s\" could be flushed within %d ms",
						NameStr(buffer->name), shutdown) :
				 errmsg("buffer \"%s\" was stopped without a flush",
						NameStr(buffer->name)),
				 errdetail_plural("A count of " INT64_FORMAT " is left in %llu key. It is kept, and flushed after sb_start().",
								  "Counts of " INT64_FORMAT " altogether are left in %llu keys. They are kept, and flushed after sb_start().",
								  (unsigned long) nkeys,
								  sum, (unsigned long long) nkeys)));
	if (pending_sum(buffer, &nkeys, &sum))
	{
		left = true;
		ereport(NOTICE,
				(errmsg("increments of this transaction are not flushed before buffer \"%s\" is started",
						NameStr(buffer->name)),
				 errdetail_plural("It has counted " INT64_FORMAT " in %llu key, and publishes that when it commits.",
								  "It has counted " INT64_FORMAT " in %llu keys, and publishes that when it commits.",
								  (unsigned long) nkeys,
								  sum, (unsigned long long) nkeys)));
	}
	return left;
}

/* Is nothing counted in a stopped buffer, nor by this transaction? */
static bool
is_empty(SbBuffer *buffer)
{
	uint64		nkeys;
	int64		sum;

	return !find_left(buffer, &nkeys, &sum) &&
		!pending_sum(buffer, &nkeys, &sum);
}

/*
 * Flush a buffer and stop it.  Returns whether nothing is left.
 * doc/internals.md explains the steps, and why nothing is left behind.
 */
static bool
stop_buffer(FunctionCallInfo fcinfo)
{
	Oid			relid = function_buffer_argument(fcinfo, 0);
	SbBuffer   *buffer;
	int64		spent = 0;		/* milliseconds of flushing */
	bool		left_behind;
	uint64		nkeys;
	int64		sum;

	buffer_check_owner(relid);
	function_check_not_standby();
	buffer = buffer_open(relid, RowShareLock);
	if (buffer->options.stopped)
		return is_empty(buffer);

	/* flush most keys while increments continue, in up to half of the time */
	if (!drain_is_locked_out_by_us(buffer))
	{
		ClockTime	start = clock_now();

		if (buffer->options.shutdown > 1)
			(void) drain_wait(buffer, buffer->options.shutdown / 2, false,
							  false);
		spent = (clock_now() - start) / 1000;
	}

	for (;;)
	{
		ClockTime	start;
		int64		left;
		DrainState	state;

		/* wait, without a limit, for transactions that have counted */
		LockRelationOid(relid, STOP_LOCK);
		buffer_check_owner(relid);
		buffer = buffer_open(relid, NoLock);
		if (buffer->options.stopped)
			return is_empty(buffer);
		left = buffer->options.shutdown - spent;
		if (left <= 0 || drain_is_locked_out_by_us(buffer) ||
			!find_left(buffer, &nkeys, &sum))
			break;

		start = clock_now();
		state = drain_wait(buffer, left, true, false);
		spent += (clock_now() - start) / 1000;
		if (state != DRAIN_DEADLOCK)
			break;

		/*
		 * Let the sessions proceed that the handler waits for, and try again.
		 */
		UnlockRelationOid(relid, STOP_LOCK);
	}

	if (buffer_attach(buffer, false))
		shut_gate(buffer->shared);
	left_behind = report_left(buffer);
	set_stopped(buffer, true);
	return !left_behind;
}

/*
 * sb_stop(buffer regclass): flush a buffer, for as long as its option
 * "shutdown" allows, and stop it.  Reports what could not be flushed, and returns
 * whether all was.
 *
 * The caller must own the buffer.  Takes STOP_LOCK on it, and its gate, both to
 * the end of the (sub)transaction, as in sb_start().  Waits for transactions
 * that have counted in the buffer.
 */
Datum
sb_stop(PG_FUNCTION_ARGS)
{
	PG_RETURN_BOOL(do_for_transaction(stop_buffer, fcinfo));
}
