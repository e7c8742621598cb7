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
#include "foreign/foreign.h"
#include "funcapi.h"
#include "functions.h"
#include "launch.h"
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

/*
 * What a function with a key argument keeps from call to call, in fn_extra:
 * so a statement that counts a lot of keys pays once for what is the same.
 */
typedef struct CallCache
{
	PendingTarget target;		/* `last' only if the key was of type text */
	bool		by_default;		/* the buffer argument was null */

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
Oid
function_default_buffer(FunctionCallInfo fcinfo)
{
	return get_relname_relid(DEFAULT_BUFFER,
							 get_func_namespace(fcinfo->flinfo->fn_oid));
}

/* The buffer that an argument says; raises an error if there is none. */
Oid
function_buffer_argument(FunctionCallInfo fcinfo, int argno)
{
	Oid			relid;

	if (!PG_ARGISNULL(argno))
		return PG_GETARG_OID(argno);
	relid = function_default_buffer(fcinfo);
	if (!OidIsValid(relid))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_TABLE),
				 errmsg("there is no default buffer"),
				 errhint("Create it with sb_start(), or name a buffer in the argument \"buffer\".")));
	return relid;
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
	return pending_is_open(&cache->target) &&
		(PG_ARGISNULL(2) ? cache->by_default :
		 cache->target.buffer->relid == PG_GETARG_OID(2));
}

static void
open_for_increment(FunctionCallInfo fcinfo, CallCache *cache)
{
	pending_open(&cache->target, function_buffer_argument(fcinfo, 2), true);
	cache->by_default = PG_ARGISNULL(2);
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
	shape = read_key(fcinfo, cache, cache->target.buffer, &space, &key);
	if (async)
	{
		pending_add_now(cache->target.buffer, shape, &key, count, cache->target.userid);
		return;
	}

	/* a subtransaction may have been rolled back, and a lock with it */
	if (cache->target.generation != buffer_generation)
		open_for_increment(fcinfo, cache);
	last = pending_add(cache->target.buffer, shape, &key, count, cache->target.userid);
	cache->target.last = takes_text(cache, shape) && !PG_ARGISNULL(0) ? last : NULL;
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
	if (is_open && cache->target.last != NULL &&
		!PG_ARGISNULL(0) && !PG_ARGISNULL(1) &&
		key_is_text(pending_key_data(cache->target.last), PG_GETARG_DATUM(0)))
		pending_add_again(cache->target.last, PG_GETARG_INT64(1), cache->target.userid);
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

	buffer_check_privilege(relid, ACL_SELECT);
	buffer = buffer_open(relid, AccessShareLock);
	if (!key_is_current(buffer, read_key(fcinfo, cache, buffer, &space, &key)))
		PG_RETURN_NULL();

	found = buffer_attach(buffer, false) && !pending_truncated(buffer) &&
		table_lookup(&buffer->table, &key, &count);
	if (buffer->pending != NULL)
		found |= pending_lookup(buffer, &key, &delta);
	if (!found)
		PG_RETURN_NULL();
	PG_RETURN_INT64(DatumGetInt64(DirectFunctionCall2(int8pl,
													  Int64GetDatum(count),
													  Int64GetDatum(delta))));
}

/* Raise an error if there can be no worker. */
void
function_check_not_standby(void)
{
	if (RecoveryInProgress())
		ereport(ERROR,
				(errcode(ERRCODE_READ_ONLY_SQL_TRANSACTION),
				 errmsg("cannot flush, start or stop a buffer during recovery"),
				 errhint("Connect to the primary server.")));
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

	buffer_check_owner(relid);
	function_check_not_standby();
	buffer = buffer_open(relid, RowShareLock);
	buffer_check_running(buffer);
	shape = read_key(fcinfo, cache, buffer, &space, &key);
	if (!key_is_current(buffer, shape))
		PG_RETURN_VOID();
	pending_request_flush(buffer, &key);
	if (buffer_attach(buffer, false))
	{
		launch_ensure();
		counters_request_flush(buffer->shared, &buffer->table, &key);
		registry_call_worker(buffer->shared);
	}
	PG_RETURN_VOID();
}

Datum
sb_flush_all(PG_FUNCTION_ARGS)
{
	Oid			relid = function_buffer_argument(fcinfo, 0);
	SbBuffer   *buffer;

	buffer_check_owner(relid);
	function_check_not_standby();
	buffer = buffer_open(relid, RowShareLock);
	buffer_check_running(buffer);
	pending_request_flush_all(buffer);
	if (buffer_attach(buffer, false))
	{
		launch_ensure();
		requests_ask(&buffer->shared->requests, REQUEST_FLUSH_ALL);
		registry_call_worker(buffer->shared);
	}
	PG_RETURN_VOID();
}
