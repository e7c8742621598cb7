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

#include "access/htup_details.h"
#include "access/table.h"
#include "access/xact.h"
#include "buffer.h"
#include "catalog/objectaddress.h"
#include "catalog/pg_authid.h"
#include "catalog/pg_type.h"
#include "compat.h"
#include "counters.h"
#include "executor/spi.h"
#include "foreign/foreign.h"
#include "funcapi.h"
#include "functions.h"
#include "handler.h"
#include "launcher.h"
#include "miscadmin.h"
#include "pending.h"
#include "storage/ipc.h"
#include "storage/lmgr.h"
#include "storage/proc.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"
#include "utils/timestamp.h"

PG_FUNCTION_INFO_V1(sb_increment);
PG_FUNCTION_INFO_V1(sb_async_increment);
PG_FUNCTION_INFO_V1(sb_count);
PG_FUNCTION_INFO_V1(sb_flush);
PG_FUNCTION_INFO_V1(sb_flush_all);
PG_FUNCTION_INFO_V1(sb_drain);
PG_FUNCTION_INFO_V1(sb_start);
PG_FUNCTION_INFO_V1(sb_stop);

#define DEFAULT_BUFFER		"sb_default"

/*
 * Starting and stopping a buffer exclude each other, and neither workers nor
 * increments.
 */
#define CONTROL_LOCK		ShareUpdateExclusiveLock

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
 * The caller has just called AcceptInvalidationMessages(), so that it is known
 * which privileges were revoked.
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

static void
increment(FunctionCallInfo fcinfo, bool async)
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

	/* a statement may run for long, and a revoked privilege is to be gone */
	AcceptInvalidationMessages();
	if (!cache_is_good(fcinfo, cache))
		open_for_increment(fcinfo, cache);
	else if (cache->last != NULL && !PG_ARGISNULL(0) &&
			 key_is_text(pending_key_data(cache->last), PG_GETARG_DATUM(0)))
	{
		pending_add_again(cache->last, count, cache->userid);
		return;
	}

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
	SbBuffer   *buffer;
	KeySpace	space;
	KeyBytes	key;

	function_check_owner(relid);
	check_not_standby();
	buffer = buffer_open(relid, RowShareLock);
	buffer_check_running(buffer);
	if (key_is_current(buffer, read_key(fcinfo, cache, buffer, &space, &key)) &&
		buffer_attach(buffer, false))
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
	DRAIN_BLOCKED				/* the worker can't lock the relation */
} DrainState;

static DrainState
look_at_drain(const SharedBufferKey *key, uint64 ticket)
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
	dshash_release_lock(shared_registry, shared);
	return state;
}

/* Has the transaction a lock on the relation? */
static bool
has_locked(Oid relid)
{
	LOCKTAG		tag;

	SET_LOCKTAG_RELATION(tag, MyDatabaseId, relid);
	for (LOCKMODE mode = AccessShareLock; mode <= MaxLockMode; mode++)
		if (compat_lock_held(&tag, mode))
			return true;
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
 * DRAIN_BLOCKED tells.
 */
static DrainState
drain(SbBuffer *buffer, int64 timeout)
{
	TimestampTz start = GetCurrentTimestamp();
	TimestampTz blocked_since = 0;
	SharedBuffer *shared;
	SharedBufferKey key;
	Relation	rel;
	bool		locked;
	bool		loaded;
	uint64		ticket;
	DrainState	state;

	/* the worker could not get at it while we wait for the worker */
	rel = table_open(buffer->relid, NoLock);
	locked = CheckRelationLockedByMe(rel, ShareLock, true);
	table_close(rel, NoLock);
	if (locked)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_IN_USE),
				 errmsg("cannot drain buffer \"%s\" in a transaction that has locked it",
						NameStr(buffer->name)),
				 errhint("Drain it before it is altered or truncated, or after that is committed.")));

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

	UnlockRelationOid(key.relid, RowShareLock);
	locked = has_locked(key.relid);

	ConditionVariablePrepareToSleep(&shared_control->drain_cv);
	while ((state = look_at_drain(&key, ticket)) != DRAIN_DONE)
	{
		TimestampTz now = GetCurrentTimestamp();
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
			buffer_check_running(buffer_open(key.relid, RowShareLock));
			UnlockRelationOid(key.relid, RowShareLock);
		}

		/* who has locked it for a moment is not to blame */
		if (state != DRAIN_BLOCKED || !locked)
			blocked_since = 0;
		else if (blocked_since == 0)
			blocked_since = now;
		else if (TimestampDifferenceExceeds(blocked_since, now, DeadlockTimeout))
			break;
		if (blocked_since != 0)
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
	state = drain(buffer, timeout);
	if (state == DRAIN_BLOCKED)
		ereport(ERROR,
				(errcode(ERRCODE_T_R_DEADLOCK_DETECTED),
				 errmsg("cannot drain buffer \"%s\" while another session waits to alter it",
						NameStr(buffer->name)),
				 errdetail("That session waits for this transaction, which has locked the buffer before, and the flush for that session."),
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
	funcid = handler_find("handle_flush", desc, &takes_arrays);
	handler = quote_qualified_identifier(get_namespace_name(get_func_namespace(funcid)),
										 get_func_name(funcid));
	execute(psprintf("CREATE FOREIGN TABLE %s"
					 " (key pg_catalog.text NOT NULL,"
					 " count pg_catalog.int8 NOT NULL DEFAULT 1)"
					 " SERVER statbuffer OPTIONS (handler %s)",
					 quote_qualified_identifier(schema, DEFAULT_BUFFER),
					 quote_literal_cstr(handler)));
	return default_buffer(fcinfo);
}

/* Set or clear the option "stopped". */
static void
set_stopped(SbBuffer *buffer, bool stopped)
{
	char	   *name;
	bool		given = false;
	ListCell   *lc;

	/* whether an option is there decides how it has to be set */
	foreach(lc, GetForeignTable(buffer->relid)->options)
		given |= strcmp(lfirst_node(DefElem, lc)->defname, "stopped") == 0;

	name = quote_qualified_identifier(get_namespace_name(get_rel_namespace(buffer->relid)),
									  NameStr(buffer->name));
	if (stopped)
		execute(psprintf("ALTER FOREIGN TABLE %s OPTIONS (%s stopped 'true')",
						 name, given ? "SET" : "ADD"));
	else if (given)
		execute(psprintf("ALTER FOREIGN TABLE %s OPTIONS (DROP stopped)",
						 name));
}

/* Raise an error when no worker could connect as the buffer's owner. */
static void
check_owner_can_login(SbBuffer *buffer)
{
	HeapTuple	tuple;
	bool		can_login;

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

Datum
sb_start(PG_FUNCTION_ARGS)
{
	Oid			relid;
	SbBuffer   *buffer;

	check_not_standby();
	relid = PG_ARGISNULL(0) ? default_buffer(fcinfo) : PG_GETARG_OID(0);
	if (PG_ARGISNULL(0) && !OidIsValid(relid))
		relid = create_default_buffer(fcinfo);

	function_check_owner(relid);
	buffer = buffer_open(relid, CONTROL_LOCK);
	handler_check(buffer->options.handler, buffer->shape->desc,
				  buffer->owner);
	check_owner_can_login(buffer);
	if (buffer->options.stopped)
	{
		set_stopped(buffer, false);
		buffer = buffer_open(relid, NoLock);
	}

	/* a worker that comes before we commit waits for our lock */
	buffer_attach(buffer, true);
	launcher_ensure();
	shared_mend(buffer->shared);
	pg_atomic_write_u32(&buffer->shared->recheck, 1);
	call_worker(buffer->shared);
	PG_RETURN_VOID();
}

/* The worker need not make way any more, however that has ended. */
static void
cancel_halt(int code, Datum arg)
{
	SharedBuffer *shared = (SharedBuffer *) DatumGetPointer(arg);

	pg_atomic_write_u64(&shared->halt_at, 0);
}

Datum
sb_stop(PG_FUNCTION_ARGS)
{
	Oid			relid = function_buffer_argument(fcinfo, 0);
	TimestampTz start = GetCurrentTimestamp();
	SharedBuffer *shared;
	SbBuffer   *buffer;

	function_check_owner(relid);
	check_not_standby();
	buffer = buffer_open(relid, CONTROL_LOCK);
	if (buffer->options.stopped)
		PG_RETURN_VOID();

	/* before the option is set, because that keeps the worker out */
	if (buffer->options.shutdown > 0)
	{
		LockRelationOid(relid, RowShareLock);
		if (drain(buffer, buffer->options.shutdown) != DRAIN_DONE)
			ereport(NOTICE,
					(errmsg("not everything in buffer \"%s\" could be flushed within %d ms",
							NameStr(buffer->name), buffer->options.shutdown),
					 errdetail("What is left is kept, and flushed after sb_start().")));
	}

	/*
	 * To set the option takes a lock for which a call of the handler must be
	 * over: it has what is left of the time.
	 */
	if (!buffer_attach(buffer, false))
	{
		set_stopped(buffer, true);
		PG_RETURN_VOID();
	}
	shared = buffer->shared;
	PG_ENSURE_ERROR_CLEANUP(cancel_halt, PointerGetDatum(shared));
	{
		pg_atomic_write_u64(&shared->halt_at,
							(uint64) TimestampTzPlusMilliseconds(start,
																 buffer->options.shutdown));
		set_stopped(buffer, true);
	}
	PG_END_ENSURE_ERROR_CLEANUP(cancel_halt, PointerGetDatum(shared));
	cancel_halt(0, PointerGetDatum(shared));
	PG_RETURN_VOID();
}
