/*-------------------------------------------------------------------------
 *
 * functions.c
 *	  SQL functions: read the arguments, check privileges, and call the room
 *	  that does it.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "access/xact.h"
#include "buffer.h"
#include "catalog/dependency.h"
#include "catalog/indexing.h"
#include "catalog/objectaccess.h"
#include "catalog/objectaddress.h"
#include "catalog/pg_authid.h"
#include "catalog/pg_depend.h"
#include "catalog/pg_extension.h"
#include "catalog/pg_foreign_server.h"
#include "catalog/pg_foreign_table.h"
#include "catalog/pg_proc.h"
#include "catalog/pg_type.h"
#include "commands/dbcommands.h"
#include "commands/defrem.h"
#include "compat.h"
#include "counters.h"
#include "executor/spi.h"
#include "flush.h"
#include "foreign/foreign.h"
#include "funcapi.h"
#include "functions.h"
#include "handler.h"
#include "launcher.h"
#include "miscadmin.h"
#include "nodes/makefuncs.h"
#include "owner.h"
#include "pending.h"
#include "storage/ipc.h"
#include "storage/lmgr.h"
#include "storage/lock.h"
#include "storage/proc.h"
#include "tcop/utility.h"
#include "utils/acl.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/fmgrprotos.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/resowner.h"
#include "utils/syscache.h"
#include "utils/timestamp.h"

COMPAT_FUNCTION_INFO_V1(sb_increment);
COMPAT_FUNCTION_INFO_V1(sb_async_increment);
COMPAT_FUNCTION_INFO_V1(sb_count);
COMPAT_FUNCTION_INFO_V1(sb_flush);
COMPAT_FUNCTION_INFO_V1(sb_flush_all);
COMPAT_FUNCTION_INFO_V1(sb_drain);
COMPAT_FUNCTION_INFO_V1(sb_start);
COMPAT_FUNCTION_INFO_V1(sb_stop);

#define DEFAULT_BUFFER		"sb_default"

/*
 * Starting and stopping a buffer exclude each other.  Starting keeps neither
 * workers nor increments out, stopping only increments: a worker's
 * RowShareLock does not conflict with STOP_LOCK, the RowExclusiveLock of
 * whoever counts does.
 */
#define CONTROL_LOCK		ShareUpdateExclusiveLock
#define STOP_LOCK			ShareRowExclusiveLock

/*
 * What a function with a key argument keeps from call to call, in fn_extra:
 * so a statement that counts a lot of keys pays once for what is the same.
 */
typedef struct CallCache
{
	/* what follows was found out when buffer_generation was this */
	uint64		generation;

	/* the buffer, for this argument and user, if it is open to count in */
	SbBuffer   *buffer;			/* NULL: none yet */
	bool		by_default;		/* the argument was null */
	Oid			userid;

	/* where the last key is counted, if it was of type text; or NULL */
	PendingKey *last;

	Oid			argtype;		/* of the key; this is constant */

	/* how to read keys, and when and for which shape that was found out */
	uint64		reader_generation;
	uint64		reader_version;
	KeyReader  *reader;			/* NULL: not yet */
	MemoryContext reader_context;
	Datum	   *values;
	bool	   *isnull;
} CallCache;

/* ------------------------------------------------------------------------
 * Arguments and privileges
 * ------------------------------------------------------------------------
 */

/* The default buffer; InvalidOid when there is none. */
static Oid
default_buffer(FunctionCallInfo fcinfo)
{
	return get_relname_relid(DEFAULT_BUFFER,
							 get_func_namespace(fcinfo->flinfo->fn_oid));
}

/* The buffer that an argument says. */
Oid
function_buffer_argument(FunctionCallInfo fcinfo, int argno)
{
	Oid			relid;

	if (!PG_ARGISNULL(argno))
		return PG_GETARG_OID(argno);
	relid = default_buffer(fcinfo);
	if (!OidIsValid(relid))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_TABLE),
				 errmsg("there is no default buffer"),
				 errhint("Create it with sb_start(), or name a buffer in the argument \"buffer\".")));
	return relid;
}

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
 * Privileges are asked for before the relation is locked, so that nobody locks
 * what he has no right to; but they are those of now, also in a transaction
 * that began before they were altered.
 */
void
function_check_privilege(Oid relid, AclMode mode)
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

void
function_check_owner(Oid relid)
{
	char	   *name;

	AcceptInvalidationMessages();
	name = relation_name(relid);
	if (!compat_owns_relation(relid, GetUserId()))
		aclcheck_error(ACLCHECK_NOT_OWNER,
					   get_relkind_objtype(get_rel_relkind(relid)), name);
}

static CallCache *
get_cache(FunctionCallInfo fcinfo)
{
	CallCache  *cache = fcinfo->flinfo->fn_extra;

	if (cache == NULL)
	{
		cache = MemoryContextAllocZero(fcinfo->flinfo->fn_mcxt,
									   sizeof(CallCache));
		cache->argtype = get_fn_expr_argtype(fcinfo->flinfo, 0);
		if (!OidIsValid(cache->argtype))
			cache->argtype = TEXTOID;
		fcinfo->flinfo->fn_extra = cache;
	}
	return cache;
}

/* Are the keys of the call's and the buffer's type text, and need no reader? */
static inline bool
takes_text(CallCache *cache, const BufferShape *shape)
{
	return cache->argtype == TEXTOID && shape->is_text;
}

/* See that there is a reader for keys of the shape. */
static void
prepare_reader(FunctionCallInfo fcinfo, CallCache *cache, SbBuffer *buffer,
			   const BufferShape *shape)
{
	uint64		generation = buffer_generation;
	MemoryContext oldcontext;

	if (cache->reader != NULL &&
		cache->reader_generation == generation &&
		cache->reader_version == shape->version)
		return;

	cache->reader = NULL;
	if (cache->reader_context == NULL)
		cache->reader_context =
			AllocSetContextCreate(fcinfo->flinfo->fn_mcxt,
								  "statbuffer key reader",
								  ALLOCSET_SMALL_SIZES);
	else
		MemoryContextReset(cache->reader_context);
	oldcontext = MemoryContextSwitchTo(cache->reader_context);
	cache->reader = key_reader_make(shape->desc, NameStr(buffer->name),
									cache->argtype);
	cache->values = palloc(shape->desc->natts * sizeof(Datum));
	cache->isnull = palloc(shape->desc->natts * sizeof(bool));
	MemoryContextSwitchTo(oldcontext);
	cache->reader_generation = generation;
	cache->reader_version = shape->version;
}

/*
 * Read the key argument into its stored form.  Returns the shape that it is
 * formed under.  Casts and input functions may run, and do anything.
 */
static const BufferShape *
read_key(FunctionCallInfo fcinfo, CallCache *cache, SbBuffer *buffer,
		 KeySpace *space, KeyBytes *key)
{
	const BufferShape *shape = buffer->shape;
	bool		runs_code;
	BufferUse	use;

	if (takes_text(cache, shape) && !PG_ARGISNULL(0))
	{
		key_form_text(PG_GETARG_DATUM(0), space, key);
		return shape;
	}

	prepare_reader(fcinfo, cache, buffer, shape);
	runs_code = key_reader_runs_code(cache->reader);
	if (runs_code)
		buffer_begin_use(buffer, &use);
	key_read(cache->reader, PG_ARGISNULL(0) ? (Datum) 0 : PG_GETARG_DATUM(0),
			 PG_ARGISNULL(0), cache->values, cache->isnull);
	key_form(shape->desc, NameStr(buffer->name), cache->values,
			 cache->isnull, space, key);
	if (runs_code)
		buffer_end_use(&use);
	return shape;
}

/* ------------------------------------------------------------------------
 * Increments
 * ------------------------------------------------------------------------
 */

/* Is the buffer that the cache knows still the one, and still open? */
static inline bool
cache_is_good(FunctionCallInfo fcinfo, CallCache *cache)
{
	return cache->generation == buffer_generation &&
		cache->buffer != NULL &&
		cache->userid == GetUserId() &&
		(PG_ARGISNULL(2) ? cache->by_default :
		 cache->buffer->relid == PG_GETARG_OID(2));
}

/*
 * The caller has called buffer_accept_changes(), so that it is known which
 * privileges were revoked.
 */
SbBuffer *
function_open_for_increment(Oid relid)
{
	Oid			userid = GetUserId();
	uint64		asked;
	SbBuffer   *buffer;

	if (buffer_is_incrementer(relid, userid))
	{
		buffer = pending_open(relid);

		/* who waited for the lock has taken in what was altered meanwhile */
		if (buffer_is_incrementer(relid, userid))
			return buffer;
	}

	asked = buffer_generation;
	function_check_privilege(relid, ACL_INSERT);
	buffer = pending_open(relid);
	buffer_note_incrementer(buffer, userid, asked);
	return buffer;
}

static void
open_for_increment(FunctionCallInfo fcinfo, CallCache *cache)
{
	uint64		generation = buffer_generation;
	Oid			relid = function_buffer_argument(fcinfo, 2);

	cache->buffer = NULL;
	cache->last = NULL;
	cache->buffer = function_open_for_increment(relid);
	cache->by_default = PG_ARGISNULL(2);
	cache->userid = GetUserId();
	cache->generation = generation;
}

/*
 * Count what the fast path in increment() cannot.  `is_open' tells that the
 * cache's buffer is the one, and open.
 */
static pg_noinline void
increment_key(FunctionCallInfo fcinfo, bool async, bool is_open)
{
	CallCache  *cache = get_cache(fcinfo);
	const BufferShape *shape;
	KeySpace	space;
	KeyBytes	key;
	PendingKey *last;
	int64		count;

	if (PG_ARGISNULL(1))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("count must not be null")));
	count = PG_GETARG_INT64(1);

	if (!is_open)
		open_for_increment(fcinfo, cache);
	shape = read_key(fcinfo, cache, cache->buffer, &space, &key);
	if (async)
	{
		pending_add_now(cache->buffer, shape, &key, count, cache->userid);
		return;
	}

	/* a subtransaction may have been rolled back, and a lock with it */
	if (cache->generation != buffer_generation)
		open_for_increment(fcinfo, cache);
	last = pending_add(cache->buffer, shape, &key, count, cache->userid);
	cache->last = takes_text(cache, shape) && !PG_ARGISNULL(0) ? last : NULL;
}

/*
 * Count.  The usual case comes first: nothing has changed since the last call,
 * and the key is the same text.
 */
static pg_attribute_always_inline void
increment(FunctionCallInfo fcinfo, bool async)
{
	CallCache  *cache = fcinfo->flinfo->fn_extra;
	bool		is_open;

	buffer_accept_changes();
	is_open = cache != NULL && cache_is_good(fcinfo, cache);
	if (is_open && cache->last != NULL &&
		!PG_ARGISNULL(0) && !PG_ARGISNULL(1) &&
		key_is_text(pending_key_data(cache->last), PG_GETARG_DATUM(0)))
		pending_add_again(cache->last, PG_GETARG_INT64(1), cache->userid);
	else
		increment_key(fcinfo, async, is_open);
}

Datum
sb_increment(PG_FUNCTION_ARGS)
{
	increment(fcinfo, false);
	PG_RETURN_VOID();
}

Datum
sb_async_increment(PG_FUNCTION_ARGS)
{
	increment(fcinfo, true);
	PG_RETURN_VOID();
}

/* ------------------------------------------------------------------------
 * Reading and flushing
 * ------------------------------------------------------------------------
 */

/*
 * After a key was read: is its shape still that of the buffer?  Code that ran
 * may have dropped a type with its column.
 */
static bool
key_is_current(SbBuffer *buffer, const BufferShape *shape)
{
	return buffer_revalidate(buffer) &&
		shape_equal(buffer->shape->keys, shape->keys);
}

Datum
sb_count(PG_FUNCTION_ARGS)
{
	CallCache  *cache = get_cache(fcinfo);
	Oid			relid = function_buffer_argument(fcinfo, 1);
	SbBuffer   *buffer;
	KeySpace	space;
	KeyBytes	key;
	int64		count = 0;
	int64		delta = 0;
	bool		found;

	function_check_privilege(relid, ACL_SELECT);
	buffer = buffer_open(relid, AccessShareLock);
	if (!key_is_current(buffer, read_key(fcinfo, cache, buffer, &space, &key)))
		PG_RETURN_NULL();

	found = buffer_attach(buffer, false) && !pending_truncated(buffer) &&
		counters_lookup(&buffer->table, &key, &count);
	if (buffer->pending != NULL)
		found |= pending_lookup(buffer, &key, &delta);
	if (!found)
		PG_RETURN_NULL();
	PG_RETURN_INT64(DatumGetInt64(DirectFunctionCall2(int8pl,
													  Int64GetDatum(count),
													  Int64GetDatum(delta))));
}

static void
check_not_standby(void)
{
	if (RecoveryInProgress())
		ereport(ERROR,
				(errcode(ERRCODE_READ_ONLY_SQL_TRANSACTION),
				 errmsg("cannot flush, start or stop a buffer during recovery"),
				 errhint("Connect to the primary server.")));
}

/*
 * Have the worker see to a request; if the buffer failed lately, that is a
 * reason not to wait until it is tried again.
 */
static void
call_worker(SharedBuffer *shared)
{
	shared->start_after = 0;
	schedule_poke(shared);
}

Datum
sb_flush(PG_FUNCTION_ARGS)
{
	CallCache  *cache = get_cache(fcinfo);
	Oid			relid = function_buffer_argument(fcinfo, 1);
	const BufferShape *shape;
	SbBuffer   *buffer;
	KeySpace	space;
	KeyBytes	key;

	function_check_owner(relid);
	check_not_standby();
	buffer = buffer_open(relid, RowShareLock);
	buffer_check_running(buffer);
	shape = read_key(fcinfo, cache, buffer, &space, &key);
	if (!key_is_current(buffer, shape))
		PG_RETURN_VOID();
	pending_request_flush(buffer, &key);
	if (buffer_attach(buffer, false))
	{
		launcher_ensure();
		counters_request_flush(buffer->shared, &buffer->table, &key);
		call_worker(buffer->shared);
	}
	PG_RETURN_VOID();
}

Datum
sb_flush_all(PG_FUNCTION_ARGS)
{
	Oid			relid = function_buffer_argument(fcinfo, 0);
	SbBuffer   *buffer;

	function_check_owner(relid);
	check_not_standby();
	buffer = buffer_open(relid, RowShareLock);
	buffer_check_running(buffer);
	pending_request_flush_all(buffer);
	if (buffer_attach(buffer, false))
	{
		launcher_ensure();
		pg_atomic_write_u32(&buffer->shared->flush_all, 1);
		call_worker(buffer->shared);
	}
	PG_RETURN_VOID();
}

/* How it stands with a drain. */
typedef enum DrainState
{
	DRAIN_WAITING,
	DRAIN_DONE,
	DRAIN_TIMED_OUT,
	DRAIN_PARKED,				/* no worker comes while it is stopped */
	DRAIN_BLOCKED,				/* the worker cannot lock the relation */
	DRAIN_DEADLOCK				/* the worker waits for this transaction */
} DrainState;

/* Also tells which process is the worker; 0: none. */
static DrainState
look_at_drain(const SharedBufferKey *key, uint64 ticket, pid_t *worker_pid)
{
	SharedBuffer *shared = dshash_find(shared_registry, key, false);
	DrainState	state = DRAIN_WAITING;

	if (shared == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_TABLE),
				 errmsg("relation with OID %u does not exist", key->relid)));
	if (pg_atomic_read_u64(&shared->drain_done) >= ticket)
		state = DRAIN_DONE;
	else if (pg_atomic_read_u32(&shared->parked) != 0)
		state = DRAIN_PARKED;
	else if (pg_atomic_read_u32(&shared->locked_out) != 0)
		state = DRAIN_BLOCKED;
	*worker_pid = shared->worker_pid;
	dshash_release_lock(shared_registry, shared);
	return state;
}

/* Has the transaction a lock on the relation, of that mode or a stronger one? */
static bool
has_locked(Oid relid, LOCKMODE weakest)
{
	LOCKTAG		tag;

	buffer_set_relation_tag(&tag, relid);
	for (LOCKMODE mode = weakest; mode <= MaxLockMode; mode++)
		if (compat_lock_held(&tag, mode))
			return true;
	return false;
}

/*
 * Does the transaction keep the worker out?  It has altered or truncated the
 * buffer, or stopped it.
 */
static bool
keeps_worker_out(SbBuffer *buffer)
{
	LOCKTAG		gate;

	if (has_locked(buffer->relid, ExclusiveLock))
		return true;
	for (int i = 0; i < buffer->shape->nrow_types; i++)
		if (has_locked(buffer->shape->row_types[i], AccessExclusiveLock))
			return true;
	flush_set_gate_tag(&gate, MyDatabaseId, buffer->relid);
	return compat_lock_held(&gate, ExclusiveLock);
}

/*
 * Does a process wait for a lock of ours, or for somebody who does?  Looks at
 * all locks of the server, so it is not to be called often.
 */
static bool
waits_for_us(int pid)
{
	List	   *pids = list_make1_int(pid);

	for (int i = 0; i < list_length(pids); i++)
	{
		Datum		blocking = DirectFunctionCall1(pg_blocking_pids,
												   Int32GetDatum(list_nth_int(pids, i)));
		ArrayType  *array = DatumGetArrayTypeP(blocking);
		int			n = ArrayGetNItems(ARR_NDIM(array), ARR_DIMS(array));

		for (int j = 0; j < n; j++)
		{
			int			other = ((int32 *) ARR_DATA_PTR(array))[j];

			if (other == MyProcPid)
				return true;
			pids = list_append_unique_int(pids, other);
		}
	}
	return false;
}

/*
 * Have everything flushed that was published so far, and wait until it is.
 * Gives up after so many milliseconds; negative: no limit.
 *
 * The caller has opened the buffer with RowShareLock, which is given back for
 * the wait.  Otherwise whoever wants to alter the buffer would wait for us,
 * the worker for him, and we for the worker; and as we don't wait for a lock,
 * nobody would notice.  When the transaction has other locks, that is what
 * DRAIN_BLOCKED tells; and DRAIN_DEADLOCK, that the handler waits for us.
 *
 * With `stopping' the caller has STOP_LOCK, which is kept: nobody publishes
 * anything meanwhile.  DRAIN_DEADLOCK then tells that the handler waits for
 * someone who is about to count.
 */
static DrainState
drain(SbBuffer *buffer, int64 timeout, bool stopping)
{
	ClockTime	start = clock_now();
	ClockTime	blocked_since = 0;
	ClockTime	looked_at = start;
	pid_t		worker_pid;
	SharedBuffer *shared;
	SharedBufferKey key;
	bool		locked;
	bool		loaded;
	uint64		ticket;
	DrainState	state;

	if (keeps_worker_out(buffer))
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_IN_USE),
				 errmsg("cannot drain buffer \"%s\" in a transaction that has locked it",
						NameStr(buffer->name)),
				 errhint("Drain it before it is altered, stopped or truncated, or after that is committed.")));

	/* what is not loaded yet can't be flushed */
	loaded = launcher_await_saved();
	if (!buffer_attach(buffer, false))
		return loaded ? DRAIN_DONE : DRAIN_TIMED_OUT;
	shared = buffer->shared;
	key = shared->key;
	if (shared->worker_pid == MyProcPid)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_IN_USE),
				 errmsg("cannot drain buffer \"%s\" from its own handler",
						NameStr(buffer->name))));
	launcher_ensure();
	ticket = pg_atomic_add_fetch_u64(&shared->drain_asked, 1);
	call_worker(shared);

	if (!stopping)
		UnlockRelationOid(key.relid, RowShareLock);

	/* row types of keys stay locked, as they may be others' */
	locked = !stopping &&
		(has_locked(key.relid, AccessShareLock) || buffer->shape->nrow_types > 0);

	ConditionVariablePrepareToSleep(&shared_control->drain_cv);
	while ((state = look_at_drain(&key, ticket, &worker_pid)) != DRAIN_DONE)
	{
		ClockTime	now = clock_now();
		int64		left = -1;

		if (timeout >= 0)
		{
			left = timeout - (now - start) / 1000;
			if (left <= 0)
			{
				state = DRAIN_TIMED_OUT;
				break;
			}
			left = Min(left, INT_MAX);
		}

		/* it may just have been started again */
		if (state == DRAIN_PARKED)
		{
			bool		stopped = buffer_open(key.relid, RowShareLock)->options.stopped;

			UnlockRelationOid(key.relid, RowShareLock);
			if (stopped)
				break;
		}

		/* who has locked it for a moment is not to blame */
		if (state != DRAIN_BLOCKED || !locked)
			blocked_since = 0;
		else if (blocked_since == 0)
			blocked_since = now;
		else if (clock_passed(blocked_since, now, DeadlockTimeout))
			break;

		/* as nobody sees that we wait, look whether somebody waits for us */
		if (clock_passed(looked_at, now, DeadlockTimeout))
		{
			looked_at = now;
			if (worker_pid != 0 && waits_for_us(worker_pid))
			{
				if (state != DRAIN_BLOCKED || !locked)
					state = DRAIN_DEADLOCK;
				break;
			}
		}
		left = left < 0 ? DeadlockTimeout : Min(left, DeadlockTimeout);

		(void) ConditionVariableTimedSleep(&shared_control->drain_cv, left,
										   compat_wait_event("StatbufferDrain"));
	}
	ConditionVariableCancelSleep();
	if (state == DRAIN_DONE && !loaded)
		state = DRAIN_TIMED_OUT;
	return state;
}

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

	function_check_owner(relid);
	check_not_standby();
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
	state = drain(buffer, timeout, false);
	if (state == DRAIN_PARKED)
		buffer_check_running(buffer);
	if (state == DRAIN_BLOCKED)
		ereport(ERROR,
				(errcode(ERRCODE_T_R_DEADLOCK_DETECTED),
				 errmsg("cannot drain buffer \"%s\" while another session waits to alter it",
						NameStr(buffer->name)),
				 errdetail("That session waits for this transaction, which has locked the buffer before, and the flush for that session."),
				 errhint("Drain the buffer in a transaction of its own.")));
	if (state == DRAIN_DEADLOCK)
		ereport(ERROR,
				(errcode(ERRCODE_T_R_DEADLOCK_DETECTED),
				 errmsg("cannot drain buffer \"%s\" while its handler waits for this transaction",
						NameStr(buffer->name)),
				 errdetail("The handler waits for a lock that this transaction has, or for somebody who waits for it."),
				 errhint("Drain the buffer in a transaction of its own.")));
	PG_RETURN_BOOL(state == DRAIN_DONE);
}

/* ------------------------------------------------------------------------
 * Starting and stopping
 * ------------------------------------------------------------------------
 */

/* Run a utility statement as the current user. */
static void
execute(const char *statement)
{
	SPI_connect();
	if (SPI_execute(statement, false, 0) != SPI_OK_UTILITY)
		elog(ERROR, "could not execute \"%s\"", statement);
	SPI_finish();
}

/*
 * The server that came with the extension, whatever it is called by now.  Users
 * may have made others.
 */
static char *
extension_server(Oid funcid)
{
	Oid			extension = getExtensionOfObject(ProcedureRelationId, funcid);
	Relation	catalog = table_open(DependRelationId, AccessShareLock);
	ScanKeyData keys[2];
	SysScanDesc scan;
	HeapTuple	tuple;
	Oid			server = InvalidOid;

	ScanKeyInit(&keys[0], Anum_pg_depend_refclassid, BTEqualStrategyNumber,
				F_OIDEQ, ObjectIdGetDatum(ExtensionRelationId));
	ScanKeyInit(&keys[1], Anum_pg_depend_refobjid, BTEqualStrategyNumber,
				F_OIDEQ, ObjectIdGetDatum(extension));
	scan = systable_beginscan(catalog, DependReferenceIndexId, true, NULL,
							  lengthof(keys), keys);
	while (HeapTupleIsValid(tuple = systable_getnext(scan)))
	{
		Form_pg_depend depend = (Form_pg_depend) GETSTRUCT(tuple);

		if (depend->classid == ForeignServerRelationId &&
			depend->deptype == DEPENDENCY_EXTENSION)
			server = depend->objid;
	}
	systable_endscan(scan);
	table_close(catalog, AccessShareLock);
	if (!OidIsValid(server))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("extension \"%s\" has no foreign server", "statbuffer")));
	return GetForeignServer(server)->servername;
}

/*
 * Make the default buffer, with the function handle_flush() that the caller
 * would call.
 */
static Oid
create_default_buffer(FunctionCallInfo fcinfo)
{
	char	   *schema = get_namespace_name(get_func_namespace(fcinfo->flinfo->fn_oid));
	TupleDesc	desc = CreateTemplateTupleDesc(1);
	Oid			funcid;
	bool		takes_arrays;
	char	   *handler;

	TupleDescInitEntry(desc, 1, "key", TEXTOID, -1, 0);
	TupleDescFinalize(desc);
	funcid = handler_find("handle_flush", desc, &takes_arrays);
	handler = quote_qualified_identifier(get_namespace_name(get_func_namespace(funcid)),
										 get_func_name(funcid));
	execute(psprintf("CREATE FOREIGN TABLE %s"
					 " (key pg_catalog.text NOT NULL,"
					 " count pg_catalog.int8 NOT NULL DEFAULT 1)"
					 " SERVER %s OPTIONS (handler %s)",
					 quote_qualified_identifier(schema, DEFAULT_BUFFER),
					 quote_identifier(extension_server(fcinfo->flinfo->fn_oid)),
					 quote_literal_cstr(handler)));
	return default_buffer(fcinfo);
}

/*
 * Set or clear the option "stopped".  The caller has CONTROL_LOCK or
 * STOP_LOCK.
 *
 * What ALTER FOREIGN TABLE does, but for the lock.  AccessExclusiveLock would
 * have to wait for whoever only looks at the buffer, and who may be about to
 * count and so wait for us.  It is not needed: whoever counts has taken his
 * lock before we had ours, or sees the option once he has it.
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
	bool		given = false;
	DefElem    *option;
	Relation	catalog;
	HeapTuple	tuple;
	Datum		options;
	ListCell   *lc;

	/* whether an option is there decides how it has to be set */
	foreach(lc, table->options)
		given |= strcmp(lfirst_node(DefElem, lc)->defname, "stopped") == 0;
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

/* Raise an error when no worker could connect as the buffer's owner. */
static void
check_owner_can_connect(SbBuffer *buffer)
{
	HeapTuple	tuple;
	bool		can_login;

	if (!compat_may_connect(MyDatabaseId, buffer->owner))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("role \"%s\" may not connect to database \"%s\"",
						GetUserNameFromId(buffer->owner, false),
						get_database_name(MyDatabaseId)),
				 errdetail("The worker of a buffer connects as the buffer's owner."),
				 errhint("Grant the role CONNECT on the database, or give the buffer another owner.")));
	if (!COMPAT_OWNER_NEEDS_LOGIN)
		return;
	tuple = SearchSysCache1(AUTHOID, ObjectIdGetDatum(buffer->owner));
	if (!HeapTupleIsValid(tuple))
		elog(ERROR, "cache lookup failed for role %u", buffer->owner);
	can_login = ((Form_pg_authid) GETSTRUCT(tuple))->rolcanlogin;
	ReleaseSysCache(tuple);
	if (!can_login)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("role \"%s\" is not permitted to log in",
						GetUserNameFromId(buffer->owner, false)),
				 errdetail("The worker of a buffer connects as the buffer's owner."),
				 errhint("Give the role LOGIN (it needs no password), or the buffer another owner.")));
}

static void
start_buffer(FunctionCallInfo fcinfo)
{
	Oid			relid;
	SbBuffer   *buffer;
	OwnerView	saved;

	check_not_standby();
	relid = PG_ARGISNULL(0) ? default_buffer(fcinfo) : PG_GETARG_OID(0);
	if (PG_ARGISNULL(0) && !OidIsValid(relid))
		relid = create_default_buffer(fcinfo);

	function_check_owner(relid);
	buffer = buffer_open(relid, CONTROL_LOCK);
	owner_enter(buffer->owner, &saved);
	handler_check(buffer->options.handler, buffer->shape->desc,
				  buffer->owner);
	owner_leave(&saved);
	check_owner_can_connect(buffer);
	if (buffer->options.stopped)
	{
		LOCKTAG		gate;

		/* a worker that comes before we commit waits here */
		flush_set_gate_tag(&gate, MyDatabaseId, relid);
		(void) LockAcquire(&gate, ExclusiveLock, false, false);
		set_stopped(buffer, false);
		buffer = buffer_open(relid, NoLock);
	}
	buffer_attach(buffer, true);
	launcher_ensure();
	shared_mend(buffer->shared);
	pg_atomic_write_u32(&buffer->shared->recheck, 1);
	call_worker(buffer->shared);
}

/*
 * Its locks last as long as what it does, which is as long as the
 * transaction, also if it is called by a cursor: see pending_open().
 */
Datum
sb_start(PG_FUNCTION_ARGS)
{
	ResourceOwner owner = CurrentResourceOwner;

	CurrentResourceOwner = CurTransactionResourceOwner;
	start_buffer(fcinfo);
	CurrentResourceOwner = owner;
	PG_RETURN_VOID();
}

/* The worker need not make way any more, however that has ended. */
static void
cancel_halt(int code, Datum arg)
{
	SharedBuffer *shared = (SharedBuffer *) DatumGetPointer(arg);

	pg_atomic_write_u64(&shared->halt_at, 0);
}

/*
 * Have the worker end what it does, and keep it from beginning anything until
 * the transaction ends.  The caller has STOP_LOCK.
 */
static void
shut_gate(SharedBuffer *shared)
{
	LOCKTAG		gate;

	flush_set_gate_tag(&gate, shared->key.dboid, shared->key.relid);
	PG_ENSURE_ERROR_CLEANUP(cancel_halt, PointerGetDatum(shared));
	{
		pg_atomic_write_u64(&shared->halt_at, (uint64) clock_now());
		(void) LockAcquire(&gate, ExclusiveLock, false, false);
	}
	PG_END_ENSURE_ERROR_CLEANUP(cancel_halt, PointerGetDatum(shared));
	cancel_halt(0, PointerGetDatum(shared));
}

/* What a buffer holds that is not stored; false when there is nothing. */
static bool
find_left(SbBuffer *buffer, uint64 *nkeys, int64 *sum)
{
	*nkeys = 0;
	*sum = 0;
	if (buffer_attach(buffer, false))
		counters_sum(&buffer->table, nkeys, sum);
	return *nkeys > 0;
}

/* Tell what an sb_stop() leaves in the buffer. */
static void
report_left(SbBuffer *buffer)
{
	int			shutdown = buffer->options.shutdown;
	uint64		nkeys;
	int64		sum;

	if (find_left(buffer, &nkeys, &sum))
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
		ereport(NOTICE,
				(errmsg("increments of this transaction are not flushed before buffer \"%s\" is started",
						NameStr(buffer->name)),
				 errdetail_plural("It has counted " INT64_FORMAT " in %llu key, and publishes that when it commits.",
								  "It has counted " INT64_FORMAT " in %llu keys, and publishes that when it commits.",
								  (unsigned long) nkeys,
								  sum, (unsigned long long) nkeys)));
}

/*
 * Flush a buffer and stop it.  The steps, and why nothing is left behind, are
 * told in doc/internals.md.
 */
static void
stop_buffer(FunctionCallInfo fcinfo)
{
	Oid			relid = function_buffer_argument(fcinfo, 0);
	SbBuffer   *buffer;
	int64		spent = 0;		/* milliseconds of flushing */
	uint64		nkeys;
	int64		sum;

	function_check_owner(relid);
	check_not_standby();
	buffer = buffer_open(relid, RowShareLock);
	if (buffer->options.stopped)
		return;

	/* most of it while increments go on; the rest of the time is for the rest */
	if (!keeps_worker_out(buffer))
	{
		ClockTime	start = clock_now();

		if (buffer->options.shutdown > 1)
			(void) drain(buffer, buffer->options.shutdown / 2, false);
		spent = (clock_now() - start) / 1000;
	}

	for (;;)
	{
		ClockTime	start;
		int64		left;
		DrainState	state;

		/* waits for those who have counted; that takes the time it takes */
		LockRelationOid(relid, STOP_LOCK);
		function_check_owner(relid);
		buffer = buffer_open(relid, NoLock);
		if (buffer->options.stopped)
			return;
		left = buffer->options.shutdown - spent;
		if (left <= 0 || keeps_worker_out(buffer) ||
			!find_left(buffer, &nkeys, &sum))
			break;

		start = clock_now();
		state = drain(buffer, left, true);
		spent += (clock_now() - start) / 1000;
		if (state != DRAIN_DEADLOCK)
			break;

		/* let those through that the handler waits for, and begin again */
		UnlockRelationOid(relid, STOP_LOCK);
	}

	if (buffer_attach(buffer, false))
		shut_gate(buffer->shared);
	report_left(buffer);
	set_stopped(buffer, true);
}

/*
 * Its locks last as long as what it does, which is as long as the
 * transaction, also if it is called by a cursor: see pending_open().
 */
Datum
sb_stop(PG_FUNCTION_ARGS)
{
	ResourceOwner owner = CurrentResourceOwner;

	CurrentResourceOwner = CurTransactionResourceOwner;
	stop_buffer(fcinfo);
	CurrentResourceOwner = owner;
	PG_RETURN_VOID();
}
