/*-------------------------------------------------------------------------
 *
 * functions.c
 *	  SQL functions that increment, read and flush keys.
 *
 * They read the arguments, check privileges, and call the room that does the
 * work.  Functions that drain, start and stop a buffer are in control.c.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xlog.h"
#include "buffer.h"
#include "catalog/pg_type.h"
#include "compat.h"
#include "counters.h"
#include "functions.h"
#include "key.h"
#include "launch.h"
#include "miscadmin.h"
#include "pending.h"
#include "registry.h"
#include "table.h"
#include "standby.h"
#include "total.h"
#include "utils/fmgrprotos.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"

COMPAT_FUNCTION_INFO_V1(sb_increment);
COMPAT_FUNCTION_INFO_V1(sb_increment_text);
COMPAT_FUNCTION_INFO_V1(sb_async_increment);
COMPAT_FUNCTION_INFO_V1(sb_count);
COMPAT_FUNCTION_INFO_V1(sb_total);
COMPAT_FUNCTION_INFO_V1(sb_flush);
COMPAT_FUNCTION_INFO_V1(sb_flush_all);

/*
 * What a function with a key argument caches in fn_extra from call to call, so
 * that a statement that counts many keys looks up only once what is the same
 * for all of them.
 */
typedef struct CallCache
{
	PendingTarget target;		/* `last' is only set for keys of type text */
	Oid			relid;			/* the buffer argument for which it was opened */
	bool		is_text;		/* takes_text() for the target */

	Oid			argtype;		/* type of the key argument; constant */

	/* the reader of keys, and for which generation and shape it was made */
	uint64		reader_generation;
	uint64		reader_version;
	KeyReader  *reader;			/* NULL if not made yet */
	MemoryContext reader_context;
	Datum	   *values;
	bool	   *isnull;
} CallCache;

/*
 * Most statements call sb_increment() once, and need no cache.  So the first
 * call, if it needs none itself, only leaves this mark in fn_extra.
 */
static char called_once;

#define CALLED_ONCE		((void *) &called_once)

/* ------------------------------------------------------------------------
 * Arguments and privileges
 * ------------------------------------------------------------------------
 */

/*
 * Get the OID of the default buffer, or InvalidOid if there is none.  Looks in
 * the schema of the called function.  Takes no lock.
 */
Oid
function_default_buffer(FunctionCallInfo fcinfo)
{
	/* another session may have dropped it and made another one */
	AcceptInvalidationMessages();
	return get_relname_relid(DEFAULT_BUFFER,
							 get_func_namespace(fcinfo->flinfo->fn_oid));
}

/*
 * Get the OID of the buffer that an argument names: the default buffer if the
 * argument is left out, which is InvalidOid.  Returns InvalidOid if there is no
 * default buffer.
 *
 * Raises an error if the argument is null: a variable that was never set must
 * not count in another buffer.
 */
Oid
function_find_buffer(FunctionCallInfo fcinfo, int argno)
{
	if (PG_ARGISNULL(argno))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("buffer must not be null"),
				 errhint("Omit the argument \"buffer\" to use the default buffer.")));
	if (OidIsValid(PG_GETARG_OID(argno)))
		return PG_GETARG_OID(argno);
	return function_default_buffer(fcinfo);
}

/*
 * Likewise, but raises an error if there is no default buffer.  Does not check
 * that the relation exists or is a buffer, and takes no lock.
 */
Oid
function_buffer_argument(FunctionCallInfo fcinfo, int argno)
{
	Oid			relid = function_find_buffer(fcinfo, argno);

	if (!OidIsValid(relid))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_TABLE),
				 errmsg("there is no default buffer"),
				 errhint("Create it with sb_start(), or specify a buffer in the argument \"buffer\".")));
	return relid;
}

static CallCache *
get_cache(FunctionCallInfo fcinfo)
{
	CallCache  *cache = fcinfo->flinfo->fn_extra;

	if (cache == NULL || cache == CALLED_ONCE)
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

/*
 * Are both the key argument and the buffer's key of type text, so that no
 * reader is needed?
 */
static inline bool
takes_text(CallCache *cache, const BufferShape *shape)
{
	return cache->argtype == TEXTOID && shape->is_text;
}

/* Ensure that the cache has a reader for keys of the shape. */
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
 * Read the key argument into its stored form.  Returns the shape under which
 * it was formed.  May run casts and input functions, which can do anything.
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

/* Is the cached buffer the one that the arguments name, and still open? */
static inline bool
cache_is_good(FunctionCallInfo fcinfo, CallCache *cache)
{
	return pending_is_open(&cache->target) &&
		!PG_ARGISNULL(2) && cache->relid == PG_GETARG_OID(2);
}

/* Keep the target that was opened in the cache. */
static void
keep_target(FunctionCallInfo fcinfo, CallCache *cache,
			const PendingTarget *target)
{
	cache->target = *target;
	cache->relid = PG_GETARG_OID(2);
	cache->is_text = takes_text(cache, target->buffer->shape);
}

static void
open_for_increment(FunctionCallInfo fcinfo, CallCache *cache)
{
	PendingTarget target;

	cache->target.buffer = NULL;
	pending_open(&target, function_buffer_argument(fcinfo, 2), true);
	keep_target(fcinfo, cache, &target);
}

/*
 * Count what the fast path in increment() does not handle, and return what the
 * function returns.  `is_open' is the result of cache_is_good().
 */
static pg_noinline int64
increment_key(FunctionCallInfo fcinfo, bool async, bool is_open)
{
	CallCache  *cache = get_cache(fcinfo);
	const BufferShape *shape;
	KeySpace	space;
	KeyBytes	key;
	int64		count;
	int64		sum;

	if (PG_ARGISNULL(1))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("count must not be null")));
	count = PG_GETARG_INT64(1);

	if (!is_open)
		open_for_increment(fcinfo, cache);
	shape = read_key(fcinfo, cache, cache->target.buffer, &space, &key);
	if (async)
		return pending_add_now(&cache->target, shape, &key, count) ? count : 0;

	/* reopen it if code that ran has rolled back what had locked it */
	if (cache->target.generation != buffer_generation)
		open_for_increment(fcinfo, cache);
	sum = pending_add(&cache->target, shape, &key, count);
	if (!takes_text(cache, shape) || PG_ARGISNULL(0))
		cache->target.last = NULL;
	return sum;
}

/*
 * Count in the first call of a statement, for a key argument of type text.
 * Without a cache, if possible: see CALLED_ONCE.
 */
static pg_noinline int64
increment_text_once(FunctionCallInfo fcinfo)
{
	PendingTarget target;
	CallCache  *cache;

	pending_open(&target, function_buffer_argument(fcinfo, 2), true);
	if (likely(target.buffer->shape->is_text &&
			   !PG_ARGISNULL(0) && !PG_ARGISNULL(1)))
	{
		Size		len;
		const char *text = key_get_text(PG_GETARG_DATUM(0), &len);

		if (likely(len <= KEY_SHORT_TEXT))
		{
			int64		sum;

			sum = pending_add_text(&target, text, len, PG_GETARG_INT64(1));
			fcinfo->flinfo->fn_extra = CALLED_ONCE;
			return sum;
		}
	}

	cache = get_cache(fcinfo);
	keep_target(fcinfo, cache, &target);
	return increment_key(fcinfo, false, true);
}

/*
 * Count a text in the target, if the stored form has a short header, and set
 * `sum' to what the function returns.  Returns false if not.
 */
static pg_attribute_always_inline bool
increment_text(FunctionCallInfo fcinfo, CallCache *cache, int64 *sum)
{
	PendingTarget *target = &cache->target;
	Size		len;
	const char *text = key_get_text(PG_GETARG_DATUM(0), &len);
	int64		count = PG_GETARG_INT64(1);

	if (target->last != NULL &&
		key_is_text(pending_key_data(target->last), text, len))
		*sum = pending_add_again(target, count);
	else if (likely(len <= KEY_SHORT_TEXT))
		*sum = pending_add_text(target, text, len, count);
	else
		return false;
	return true;
}

/*
 * Count.  Checks first for the most common case: nothing has changed since the
 * last call, and the key is a text.
 */
static pg_attribute_always_inline int64
increment(FunctionCallInfo fcinfo, bool async)
{
	CallCache  *cache = fcinfo->flinfo->fn_extra;
	bool		is_open = false;
	int64		sum;

	/* opening the buffer accepts changes, too */
	if (cache != NULL && cache != CALLED_ONCE)
	{
		buffer_accept_changes();
		is_open = cache_is_good(fcinfo, cache);
		if (is_open && !async && cache->is_text &&
			!PG_ARGISNULL(0) && !PG_ARGISNULL(1) &&
			increment_text(fcinfo, cache, &sum))
			return sum;
	}
	return increment_key(fcinfo, async, is_open);
}

/*
 * sb_increment(key, count bigint, buffer regclass): add to a key, as part of
 * the transaction.  Returns the sum of what the transaction has added to it.
 *
 * There is one SQL function for keys of type text and one for all other types;
 * the same is true of the other functions that have a key.  ("char", which
 * matches both, has another one.)  This one takes any.
 *
 * Requires the INSERT privilege, and SELECT as well to add more than
 * MODERATE_DELTA.  Takes RowExclusiveLock on the buffer, to the end of the
 * (sub)transaction.  Raises an error if the buffer is stopped; what depends on
 * the shared count, such as its range and the memory for the key, is only
 * checked at commit.
 */
Datum
sb_increment(PG_FUNCTION_ARGS)
{
	PG_RETURN_INT64(increment(fcinfo, false));
}

/* The same for keys of type text, which need not be looked up. */
Datum
sb_increment_text(PG_FUNCTION_ARGS)
{
	if (likely(fcinfo->flinfo->fn_extra == NULL))
		PG_RETURN_INT64(increment_text_once(fcinfo));
	PG_RETURN_INT64(increment(fcinfo, false));
}

/*
 * sb_async_increment(key, count bigint, buffer regclass): add to a key
 * immediately, whatever becomes of the transaction.  Returns what it has added:
 * the count, or 0 if it was discarded.
 *
 * Privileges and locks are those of sb_increment().  Raises all errors
 * immediately, and also if the transaction has altered the buffer's columns.
 */
Datum
sb_async_increment(PG_FUNCTION_ARGS)
{
	PG_RETURN_INT64(increment(fcinfo, true));
}

/* ------------------------------------------------------------------------
 * Reading and flushing
 * ------------------------------------------------------------------------
 */

/*
 * Is the shape under which a key was read still that of the buffer?  Code that
 * ran may have dropped a type, and the column with it.
 */
static bool
key_is_current(SbBuffer *buffer, const BufferShape *shape)
{
	return buffer_revalidate(buffer) &&
		shape_equal(buffer->shape->keys, shape->keys);
}

/*
 * sb_count(key, buffer regclass): what is counted for a key and not yet
 * stored, including what the transaction itself has added; null if the buffer
 * does not hold the key.
 *
 * Requires the SELECT privilege.  Takes AccessShareLock on the buffer.
 */
Datum
sb_count(PG_FUNCTION_ARGS)
{
	CallCache  *cache = get_cache(fcinfo);
	Oid			relid = function_buffer_argument(fcinfo, 1);
	SbBuffer   *buffer;
	KeySpace	space;
	KeyBytes	key;
	int64		count = 0;
	int64		in_flight = 0;
	int64		delta = 0;
	bool		found;

	buffer_check_privilege(relid, ACL_SELECT);
	buffer = buffer_open(relid, AccessShareLock);
	if (!key_is_current(buffer, read_key(fcinfo, cache, buffer, &space, &key)))
		PG_RETURN_NULL();

	if (standby_applies(buffer))
	{
		Snapshot	snapshot;

		found = standby_look_up(standby_read(buffer, &snapshot), &key, &count);
		UnregisterSnapshot(snapshot);
		if (!found)
			PG_RETURN_NULL();
		PG_RETURN_INT64(count);
	}
	found = buffer_attach_for_key(buffer, &key) && !pending_truncated(buffer) &&
		table_read(&buffer->table, &key, &count, &in_flight);
	if (buffer->pending != NULL)
		found |= pending_lookup(buffer, &key, &delta);
	if (!found)
		PG_RETURN_NULL();

	/* counters_pin() keeps the sum of what is shared in range */
	PG_RETURN_INT64(DatumGetInt64(DirectFunctionCall2(int8pl,
													  Int64GetDatum(count + in_flight),
													  Int64GetDatum(delta))));
}

/*
 * sb_total(key, buffer regclass): what is stored for a key in the buffer's
 * target, plus what is counted, including what the transaction itself has added;
 * 0 if there is neither.
 *
 * Requires the SELECT privilege on the buffer, and on the columns of the target.
 * Takes AccessShareLock on both.  Raises an error if the buffer has no target, or
 * one that cannot be read.
 */
Datum
sb_total(PG_FUNCTION_ARGS)
{
	CallCache  *cache = get_cache(fcinfo);
	Oid			relid = function_buffer_argument(fcinfo, 1);
	SbBuffer   *buffer;
	const BufferShape *shape;
	KeySpace	space;
	KeyBytes	key;

	buffer_check_privilege(relid, ACL_SELECT);
	buffer = buffer_open(relid, AccessShareLock);
	shape = read_key(fcinfo, cache, buffer, &space, &key);
	if (!buffer_revalidate(buffer))
		elog(ERROR, "buffer %u was dropped while its key was read", relid);
	buffer_check_shape(buffer, shape);
	total_check_target(buffer);
	PG_RETURN_INT64(total_read(buffer, shape, &key));
}

/* Raise an error during recovery, when there can be no worker. */
void
function_check_not_standby(void)
{
	if (RecoveryInProgress())
		ereport(ERROR,
				(errcode(ERRCODE_READ_ONLY_SQL_TRANSACTION),
				 errmsg("cannot flush, start or stop a buffer during recovery"),
				 errhint("Connect to the primary server.")));
}

/* Does the buffer hold a count, other than 0, for a key? */
static bool
has_count(const CounterTable *table, const KeyBytes *key)
{
	int64		count;
	int64		in_flight;

	return table_read(table, key, &count, &in_flight) &&
		(count != 0 || in_flight != 0);
}

/*
 * sb_flush(key, buffer regclass): ask the worker to flush a key at once,
 * without waiting for it.  What the transaction itself has added is flushed
 * when it commits.  Returns whether there is anything to flush: a count that is
 * not 0, of the transaction or not.
 *
 * The caller must own the buffer.  Takes RowShareLock on it.  Raises an error
 * if the buffer is stopped.
 */
Datum
sb_flush(PG_FUNCTION_ARGS)
{
	CallCache  *cache = get_cache(fcinfo);
	Oid			relid = function_buffer_argument(fcinfo, 1);
	const BufferShape *shape;
	SbBuffer   *buffer;
	KeySpace	space;
	KeyBytes	key;
	bool		any;

	buffer_check_owner(relid);
	function_check_not_standby();
	buffer = buffer_open(relid, RowShareLock);
	buffer_check_running(buffer);
	shape = read_key(fcinfo, cache, buffer, &space, &key);
	if (!key_is_current(buffer, shape))
		PG_RETURN_BOOL(false);
	any = pending_request_flush(buffer, &key);
	if (buffer_attach(buffer, false))
	{
		any |= has_count(&buffer->table, &key);
		launch_ensure();
		counters_request_flush(buffer->shared, &buffer->table, &key);
		registry_call_worker(buffer->shared);
	}
	PG_RETURN_BOOL(any);
}

/* Keys of the transaction that a buffer does not hold. */
typedef struct NewKeys
{
	const CounterTable *table;	/* NULL if it holds none */
	uint64		n;
} NewKeys;

/* Count a key of the transaction: a PendingVisitor. */
static void
visit_pending(const KeyBytes *key, int64 delta, void *arg)
{
	NewKeys    *new_keys = arg;

	if (delta != 0 &&
		(new_keys->table == NULL || !has_count(new_keys->table, key)))
		new_keys->n++;
}

/*
 * Get the number of keys that have a count: in the buffer, or in the
 * transaction.
 */
static uint64
count_keys(SbBuffer *buffer, bool attached)
{
	NewKeys		new_keys = {attached ? &buffer->table : NULL, 0};
	uint64		nkeys = 0;
	int64		sum;

	if (attached)
		table_sum(&buffer->table, TABLE_ALL_SHAPES, &nkeys, &sum);
	if (buffer->pending != NULL)
	{
		pending_begin_scan(buffer);
		pending_scan_rest(buffer, visit_pending, &new_keys);
	}
	return nkeys + new_keys.n;
}

/*
 * sb_flush_all(buffer regclass): like sb_flush(), for all keys of a buffer.
 * Returns their number, for which it reads all that the buffer holds.
 */
Datum
sb_flush_all(PG_FUNCTION_ARGS)
{
	Oid			relid = function_buffer_argument(fcinfo, 0);
	SbBuffer   *buffer;
	bool		attached;
	uint64		nkeys;

	buffer_check_owner(relid);
	function_check_not_standby();
	buffer = buffer_open(relid, RowShareLock);
	buffer_check_running(buffer);
	attached = buffer_attach(buffer, false);
	nkeys = count_keys(buffer, attached);
	pending_request_flush_all(buffer);
	if (attached)
	{
		launch_ensure();
		requests_ask(&buffer->shared->requests, REQUEST_FLUSH_ALL);
		registry_call_worker(buffer->shared);
	}
	PG_RETURN_INT64((int64) nkeys);
}
