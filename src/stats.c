/*-------------------------------------------------------------------------
 *
 * stats.c
 *	  What operators look at: the view sb_stat_buffers, and sb_keys().
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/reloptions.h"
#include "buffer.h"
#include "catalog/pg_authid.h"
#include "catalog/pg_foreign_table.h"
#include "commands/defrem.h"
#include "compat.h"
#include "counters.h"
#include "funcapi.h"
#include "functions.h"
#include "launch.h"
#include "miscadmin.h"
#include "registry.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/regproc.h"
#include "utils/syscache.h"
#include "utils/timestamp.h"
#include "utils/tuplestore.h"

COMPAT_FUNCTION_INFO_V1(sb_stat_get_buffer);
COMPAT_FUNCTION_INFO_V1(sb_get_keys);
COMPAT_FUNCTION_INFO_V1(sb_reset_stats);

#define STAT_COLUMNS	17
#define KEY_COLUMNS		6

/*
 * A library that is newer or older than the extension's SQL objects may not
 * have the columns that these say.
 */
static void
check_columns(FunctionCallInfo fcinfo, TupleDesc desc, int expected)
{
	if (desc->natts != expected)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_FUNCTION_DEFINITION),
				 errmsg("function %s returns %d columns, but its library has %d",
						format_procedure(fcinfo->flinfo->fn_oid),
						desc->natts, expected),
				 errhint("Run ALTER EXTENSION statbuffer UPDATE, or install the version of statbuffer that the database has.")));
}

/* A timestamp, or null for 0. */
static void
set_time(Datum *value, bool *isnull, TimestampTz time)
{
	*isnull = time == 0;
	*value = TimestampTzGetDatum(time);
}

/* A time by our clock as a timestamp, or null for 0 or what never comes. */
static void
set_clock_time(Datum *value, bool *isnull, ClockTime time, int64 to_timestamp)
{
	*isnull = time == 0 || time == SCHEDULE_NEVER;
	*value = TimestampTzGetDatum(*isnull ? 0 : time + to_timestamp);
}

/* May the user see what could tell a secret? */
static bool
may_see_all(Oid relid)
{
	return has_privs_of_role(GetUserId(), ROLE_PG_READ_ALL_STATS) ||
		(SearchSysCacheExists1(RELOID, ObjectIdGetDatum(relid)) &&
		 compat_owns_relation(relid, GetUserId()));
}

/* Read the option "stopped"; false when the relation is no foreign table. */
static bool
is_stopped(Oid relid, bool *stopped)
{
	HeapTuple	tuple = SearchSysCache1(FOREIGNTABLEREL,
										ObjectIdGetDatum(relid));
	Datum		options;
	bool		isnull;
	ListCell   *lc;

	*stopped = false;
	if (!HeapTupleIsValid(tuple))
		return false;
	options = SysCacheGetAttr(FOREIGNTABLEREL, tuple,
							  Anum_pg_foreign_table_ftoptions, &isnull);
	if (!isnull)
	{
		foreach(lc, untransformRelOptions(options))
		{
			DefElem    *option = lfirst_node(DefElem, lc);

			if (strcmp(option->defname, "stopped") == 0)
				(void) parse_bool(defGetString(option), stopped);
		}
	}
	ReleaseSysCache(tuple);
	return true;
}

/*
 * The statistics of a buffer; null when the relation is none.  Takes no lock
 * on the relation, so that nobody who alters it keeps operators from looking.
 */
Datum
sb_stat_get_buffer(PG_FUNCTION_ARGS)
{
	Oid			relid = PG_GETARG_OID(0);
	SharedBufferKey key = {MyDatabaseId, relid};
	SharedBuffer *shared = NULL;
	TupleDesc	desc;
	Datum		values[STAT_COLUMNS] = {0};
	bool		isnull[STAT_COLUMNS];
	uint64		total[STAT_COUNT];
	uint64		in_flight;
	uint64		pending;
	int			i = 0;
	bool		failing;
	bool		stopped;
	bool		see_all;
	const char *state;

	if (!is_stopped(relid, &stopped))
		PG_RETURN_NULL();
	see_all = may_see_all(relid);
	if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");
	check_columns(fcinfo, desc, STAT_COLUMNS);
	desc = BlessTupleDesc(desc);
	memset(isnull, true, sizeof(isnull));

	(void) launch_await_load();

	/* its lock in the registry keeps the buffer where it is */
	if (registry_attach(false))
		shared = registry_lock(&key);
	if (shared == NULL)
	{
		values[0] = CStringGetTextDatum(stopped ? "stopped" : "idle");
		isnull[0] = false;

		/* from "keys" to "in_flight", and from "increments" to "discarded" */
		for (i = 2; i < 6; i++)
			isnull[i] = false;
		for (i = 7; i < 13; i++)
			isnull[i] = false;
		PG_RETURN_DATUM(HeapTupleGetDatum(heap_form_tuple(desc, values,
														  isnull)));
	}

	LWLockAcquire(&shared->totals.lock, LW_SHARED);
	in_flight = pg_atomic_read_u64(&shared->totals.in_flight);
	for (int s = 0; s < STAT_COUNT; s++)
		total[s] = pg_atomic_read_u64(&shared->totals.stats[s]);
	pending = total[STAT_PUBLISHED] - total[STAT_FLUSHED_COUNT] -
		total[STAT_DISCARDED] - in_flight;

	failing = shared->totals.broken || pg_atomic_read_u32(&shared->table.failing) > 0;
	state = stopped ? "stopped" : failing ? "failing" :
		shared->slot.pid != 0 ? "running" : "idle";
	values[i] = CStringGetTextDatum(state);
	isnull[i++] = false;
	values[i] = Int32GetDatum((int32) shared->slot.pid);
	isnull[i++] = shared->slot.pid == 0;
	values[i] = Int64GetDatum((int64) pg_atomic_read_u64(&shared->table.nkeys));
	isnull[i++] = false;
	values[i] = Int64GetDatum((int64) pending);
	isnull[i++] = false;
	values[i] = Int64GetDatum((int64) in_flight);
	isnull[i++] = false;
	values[i] = Int64GetDatum((int64) (pg_atomic_read_u64(&shared->table.nbytes) +
									   sizeof(SharedBuffer)));
	isnull[i++] = false;
	if (pending != 0)
		set_clock_time(&values[i], &isnull[i],
					   (ClockTime) pg_atomic_read_u64(&shared->schedule.first_due),
					   clock_to_timestamp());
	i++;

	for (int s = 0; s < STAT_COUNT; s++)
	{
		if (s == STAT_PUBLISHED)
			continue;
		values[i] = Int64GetDatum((int64) (total[s] - shared->totals.base[s]));
		isnull[i++] = false;
	}
	set_time(&values[i], &isnull[i],
			 (TimestampTz) pg_atomic_read_u64(&shared->totals.last_flush));
	i++;
	if (see_all && shared->totals.last_error_at != 0)
	{
		values[i] = CStringGetTextDatum(shared->totals.last_error);
		isnull[i] = false;
	}
	i++;
	set_time(&values[i], &isnull[i], shared->totals.last_error_at);
	i++;
	set_time(&values[i], &isnull[i], shared->totals.reset_at);
	i++;
	LWLockRelease(&shared->totals.lock);
	registry_unlock(shared);

	Assert(i == desc->natts);
	PG_RETURN_DATUM(HeapTupleGetDatum(heap_form_tuple(desc, values, isnull)));
}

/* A key as sb_keys() found it; what is shown is made of it later. */
typedef struct KeyRow
{
	int64		count;
	int64		in_flight;
	ClockTime	counted_at;
	int			failures;
	int			keylen;
	int			errorlen;		/* -1: none */
	char		data[FLEXIBLE_ARRAY_MEMBER];	/* key, error */
} KeyRow;

static void
collect_key(const CounterInfo *info, void *arg)
{
	List	  **rows = arg;
	Size		keylen = KEY_LENGTH(info->keylen);
	Size		errorlen = info->error ? strlen(info->error) : 0;
	KeyRow	   *row = palloc(offsetof(KeyRow, data) + keylen + errorlen);

	row->count = info->count;
	row->in_flight = info->in_flight;
	row->counted_at = info->counted_at;
	row->failures = info->failures;
	row->keylen = info->keylen;
	row->errorlen = info->error ? errorlen : -1;
	memcpy(row->data, info->key, keylen);
	if (info->error)
		memcpy(row->data + keylen, info->error, errorlen);
	*rows = lappend(*rows, row);
}

/*
 * The keys that a buffer holds.
 *
 * Argument: the relation, which the caller may read.
 */
Datum
sb_get_keys(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
	Oid			relid = function_buffer_argument(fcinfo, 0);
	SbBuffer   *buffer;
	BufferUse	use;
	List	   *rows = NIL;
	ListCell   *lc;
	bool		see_all;
	int64		to_timestamp = clock_to_timestamp();

	buffer_check_privilege(relid, ACL_SELECT);
	see_all = may_see_all(relid);
	InitMaterializedSRF(fcinfo, 0);
	check_columns(fcinfo, rsinfo->setDesc, KEY_COLUMNS);
	buffer = buffer_open(relid, AccessShareLock);
	if (!buffer_attach(buffer, false))
		return (Datum) 0;

	buffer_begin_use(buffer, &use);
	table_visit(&buffer->shared->table, &buffer->table, collect_key, &rows);
	foreach(lc, rows)
	{
		KeyRow	   *row = lfirst(lc);
		text	   *key = key_out(buffer->shape->desc, row->data, row->keylen);
		Datum		values[KEY_COLUMNS];
		bool		isnull[KEY_COLUMNS] = {0};
		ClockTime	due_at;

		values[0] = PointerGetDatum(key);
		isnull[0] = key == NULL;
		values[1] = Int64GetDatum(row->count);
		values[2] = Int64GetDatum(row->in_flight);
		due_at = row->counted_at;
		if (due_at != 0 && row->failures == 0)
			due_at += registry_interval(buffer->shared);
		set_clock_time(&values[3], &isnull[3], due_at, to_timestamp);
		values[4] = Int32GetDatum(row->failures);
		isnull[5] = row->errorlen < 0 || !see_all;
		if (!isnull[5])
			values[5] = PointerGetDatum(cstring_to_text_with_len(row->data + KEY_LENGTH(row->keylen),
																 row->errorlen));
		tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values,
							 isnull);
		CHECK_FOR_INTERRUPTS();
	}
	buffer_end_use(&use);
	return (Datum) 0;
}

/* Set the statistics of a buffer to zero. */
Datum
sb_reset_stats(PG_FUNCTION_ARGS)
{
	Oid			relid = function_buffer_argument(fcinfo, 0);
	SbBuffer   *buffer;

	buffer_check_owner(relid);
	buffer = buffer_open(relid, RowShareLock);
	if (!buffer_attach(buffer, false))
		PG_RETURN_VOID();

	registry_reset_stats(buffer->shared);
	PG_RETURN_VOID();
}
