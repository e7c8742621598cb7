/*-------------------------------------------------------------------------
 *
 * stats.c
 *	  Statistics: the views, and sb_keys().
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
#include "settings.h"
#include "storage/lmgr.h"
#include "total.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/memutils.h"
#include "utils/regproc.h"
#include "utils/syscache.h"
#include "utils/timestamp.h"
#include "utils/tuplestore.h"

COMPAT_FUNCTION_INFO_V1(sb_stat_get_buffer);
COMPAT_FUNCTION_INFO_V1(sb_stat_get_memory);
COMPAT_FUNCTION_INFO_V1(sb_get_keys);
COMPAT_FUNCTION_INFO_V1(sb_get_totals);
COMPAT_FUNCTION_INFO_V1(sb_reset_stats);

#define STAT_COLUMNS	18
#define MEMORY_COLUMNS	5
#define KEY_COLUMNS		6
#define TOTAL_COLUMNS	2

/*
 * Raise an error if the result does not have the expected number of columns:
 * the extension's SQL objects may be older or newer than the library.
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

/* Get the row type that a function returns, with that number of columns. */
static TupleDesc
get_row_type(FunctionCallInfo fcinfo, int ncolumns)
{
	TupleDesc	desc;

	if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");
	check_columns(fcinfo, desc, ncolumns);
	return BlessTupleDesc(desc);
}

/* Convert a timestamp; 0 gives null. */
static void
set_time(Datum *value, bool *isnull, TimestampTz time)
{
	*isnull = time == 0;
	*value = TimestampTzGetDatum(time);
}

/* Convert a ClockTime to a timestamp; 0 and SCHEDULE_NEVER give null. */
static void
set_clock_time(Datum *value, bool *isnull, ClockTime time, int64 to_timestamp)
{
	*isnull = time == 0 || time == SCHEDULE_NEVER;
	*value = TimestampTzGetDatum(*isnull ? 0 : time + to_timestamp);
}

/* May the user see error messages, which could contain confidential data? */
static bool
may_see_all(Oid relid)
{
	return has_privs_of_role(GetUserId(), ROLE_PG_READ_ALL_STATS) ||
		(SearchSysCacheExists1(RELOID, ObjectIdGetDatum(relid)) &&
		 compat_owns_relation(relid, GetUserId()));
}

/* Get an option that is a boolean, and false by default. */
static bool
get_flag(List *options, const char *name)
{
	DefElem    *option = options_find(options, name);
	bool		flag = false;

	if (option != NULL)
		(void) parse_bool(defGetString(option), &flag);
	return flag;
}

/*
 * Get the options "stopped" and "durable".  Returns false if the relation is not
 * a foreign table.
 */
static bool
get_flags(Oid relid, bool *stopped, bool *durable)
{
	HeapTuple	tuple = SearchSysCache1(FOREIGNTABLEREL,
										ObjectIdGetDatum(relid));
	Datum		options;
	bool		isnull;

	*stopped = false;
	*durable = false;
	if (!HeapTupleIsValid(tuple))
		return false;
	options = SysCacheGetAttr(FOREIGNTABLEREL, tuple,
							  Anum_pg_foreign_table_ftoptions, &isnull);
	if (!isnull)
	{
		List	   *list = untransformRelOptions(options);

		*stopped = get_flag(list, "stopped");
		*durable = get_flag(list, "durable");
	}
	ReleaseSysCache(tuple);
	return true;
}

/* A row that is filled column by column. */
typedef struct StatRow
{
	int			n;
	Datum		values[STAT_COLUMNS];
	bool		isnull[STAT_COLUMNS];
} StatRow;

static void
put(StatRow *row, Datum value, bool isnull)
{
	Assert(row->n < STAT_COLUMNS);
	row->values[row->n] = value;
	row->isnull[row->n++] = isnull;
}

/* Put a text; NULL gives null. */
static void
put_text(StatRow *row, const char *text)
{
	put(row, text ? CStringGetTextDatum(text) : (Datum) 0, text == NULL);
}

static void
put_count(StatRow *row, uint64 count)
{
	put(row, Int64GetDatum((int64) count), false);
}

static void
put_time(StatRow *row, TimestampTz time)
{
	Datum		value;
	bool		isnull;

	set_time(&value, &isnull, time);
	put(row, value, isnull);
}

/* The statistics of a buffer. */
typedef struct BufferStats
{
	pid_t		pid;			/* 0: no worker */
	bool		failing;
	uint64		nkeys;
	uint64		in_flight;
	uint64		memory;
	ClockTime	first_due;
	uint64		total[STAT_COUNT];	/* since the buffer was registered */
	uint64		base[STAT_COUNT];	/* at the last reset */
	TimestampTz last_flush;
	TimestampTz reset_at;
	SharedFailure failure;
} BufferStats;

/*
 * Read the statistics; all are 0 if the buffer has no shared part.  Locks the
 * partition of the registry and takes SharedTotals.lock.
 */
static void
read_stats(Oid relid, BufferStats *stats)
{
	SharedBufferKey key = {MyDatabaseId, relid};
	SharedBuffer *shared = NULL;
	SharedTotals *totals;

	memset(stats, 0, sizeof(BufferStats));
	if (registry_attach(false))
		shared = registry_lock(&key);
	if (shared == NULL)
		return;

	totals = &shared->totals;
	LWLockAcquire(&totals->lock, LW_SHARED);
	stats->in_flight = pg_atomic_read_u64(&totals->in_flight);

	/*
	 * From the last to the first: what is stored or discarded meanwhile is
	 * then not missing from what is published.
	 */
	for (int i = STAT_COUNT - 1; i >= 0; i--)
		stats->total[i] = pg_atomic_read_u64(&totals->stats[i]);
	memcpy(stats->base, totals->base, sizeof(stats->base));
	stats->failing = totals->broken ||
		pg_atomic_read_u32(&shared->table.failing) > 0;
	stats->last_flush = (TimestampTz) pg_atomic_read_u64(&totals->last_flush);
	stats->reset_at = totals->reset_at;
	stats->failure = totals->failure;
	LWLockRelease(&totals->lock);

	stats->pid = shared->slot.pid;
	stats->nkeys = table_nkeys(&shared->table);
	stats->memory = registry_memory(shared);
	stats->first_due = (ClockTime) pg_atomic_read_u64(&shared->schedule.first_due);
	registry_unlock(shared);
}

/* Format a failure for display, as psql shows an error. */
static char *
format_failure(const SharedFailure *failure)
{
	StringInfoData text;

	initStringInfo(&text);
	appendStringInfoString(&text, failure->message);
	if (failure->detail[0] != '\0')
		appendStringInfo(&text, "\nDETAIL:  %s", failure->detail);
	if (failure->hint[0] != '\0')
		appendStringInfo(&text, "\nHINT:  %s", failure->hint);
	return text.data;
}

/*
 * sb_stat_get_buffer(regclass): the statistics of a buffer, for the view
 * sb_stat_buffers; null if the relation is not a foreign table.
 *
 * Takes no lock on the relation, so that the view can be used while a session
 * alters it.
 */
Datum
sb_stat_get_buffer(PG_FUNCTION_ARGS)
{
	Oid			relid = PG_GETARG_OID(0);
	TupleDesc	desc;
	BufferStats stats;
	StatRow		row = {.n = 0};
	uint64		pending;
	Datum		due;
	bool		no_due = true;
	bool		stopped;
	bool		durable;

	if (!get_flags(relid, &stopped, &durable))
		PG_RETURN_NULL();
	desc = get_row_type(fcinfo, STAT_COLUMNS);

	(void) launch_await_load(relid, LAUNCH_ALL_KEYS);
	read_stats(relid, &stats);
	pending = stats.total[STAT_PUBLISHED] - stats.total[STAT_FLUSHED_COUNT] -
		stats.total[STAT_DISCARDED] - stats.in_flight;

	put_text(&row, stopped ? "stopped" : stats.failing ? "failing" :
			 stats.pid != 0 ? "running" : "idle");
	put(&row, Int32GetDatum((int32) stats.pid), stats.pid == 0);
	put_count(&row, stats.nkeys);
	put_count(&row, pending);
	put_count(&row, stats.in_flight);
	put_count(&row, stats.memory);
	if (pending != 0)
		set_clock_time(&due, &no_due, stats.first_due, clock_to_timestamp());
	put(&row, no_due ? (Datum) 0 : due, no_due);
	put_text(&row, !durable ? "off" : launch_ledger_is_loaded(relid) ? "on" : "pending");
	for (int i = 0; i < STAT_COUNT; i++)
		if (i != STAT_PUBLISHED)
			put_count(&row, stats.total[i] - stats.base[i]);
	put_time(&row, stats.last_flush);
	put_text(&row, stats.failure.at != 0 && may_see_all(relid) ?
			 format_failure(&stats.failure) : NULL);
	put_time(&row, stats.failure.at);
	put_time(&row, stats.reset_at);

	Assert(row.n == desc->natts);
	PG_RETURN_DATUM(HeapTupleGetDatum(heap_form_tuple(desc, row.values,
													  row.isnull)));
}

/*
 * sb_stat_get_memory(): the memory of all buffers of all databases, for the view
 * sb_stat_memory.  That is also memory of buffers which no view shows, because
 * the transaction that has created them has not committed.
 */
Datum
sb_stat_get_memory(PG_FUNCTION_ARGS)
{
	TupleDesc	desc;
	StatRow		row = {.n = 0};
	uint64		nbuffers = 0;
	uint64		nkeys = 0;
	uint64		nbytes = 0;
	size_t		mapped = 0;

	desc = get_row_type(fcinfo, MEMORY_COLUMNS);

	(void) launch_await_load(InvalidOid, LAUNCH_ALL_KEYS);
	if (registry_attach(false))
	{
		RegistryScan scan;
		SharedBuffer *buffer;

		registry_begin_scan(&scan);
		while ((buffer = registry_next(&scan)) != NULL)
		{
			nbuffers++;
			nkeys += table_nkeys(&buffer->table);
			nbytes += registry_memory(buffer);
		}
		registry_end_scan(&scan);
		if (COMPAT_AREA_SIZE_KNOWN)
			mapped = space_mapped();
	}

	put_count(&row, nbuffers);
	put_count(&row, nkeys);
	put_count(&row, nbytes);
	put(&row, Int64GetDatum((int64) mapped), !COMPAT_AREA_SIZE_KNOWN);
	put_count(&row, (uint64) statbuffer_max_memory * 1024);
	Assert(row.n == desc->natts);
	PG_RETURN_DATUM(HeapTupleGetDatum(heap_form_tuple(desc, row.values,
													  row.isnull)));
}

/* A key as it was found in the table; it is converted for display later. */
typedef struct KeyRow
{
	int64		count;
	int64		in_flight;
	ClockTime	counted_at;
	int			failures;
	int			shape;
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
	row->shape = info->shape;
	row->keylen = info->keylen;
	row->errorlen = info->error ? errorlen : -1;
	memcpy(row->data, info->key, keylen);
	if (info->error)
		memcpy(row->data + keylen, info->error, errorlen);
	*rows = lappend(*rows, row);
}

/* A function that returns the keys of a buffer, and how. */
typedef struct KeyOutput
{
	SbBuffer   *buffer;
	ReturnSetInfo *rsinfo;
	bool		see_all;		/* also errors */
	int64		to_timestamp;	/* clock_to_timestamp() */
	MemoryContext context;		/* of what follows */
	OlderShape *older[TABLE_SHAPES];	/* those that were needed so far */
} KeyOutput;

typedef void (*PutKey) (KeyOutput *output, KeyRow *key);

/* Is a key of a shape that does not fit the key columns? */
static bool
is_older(const KeyOutput *output, const KeyRow *key)
{
	return (output->buffer->table.readable & ((uint32) 1 << key->shape)) == 0;
}

/*
 * Convert a key to text, or a null to NULL.  One that was counted before the key
 * columns were altered is shown as what it was counted; if it cannot be read any
 * more, by its bytes.
 */
static text *
get_name(KeyOutput *output, const KeyRow *key)
{
	TupleDesc	desc = output->buffer->shape->desc;
	bytea	   *bytes;
	int			len = KEY_LENGTH(key->keylen);

	if (is_older(output, key))
	{
		OlderShape *older = output->older[key->shape];

		if (older == NULL)
		{
			MemoryContext oldcontext = MemoryContextSwitchTo(output->context);

			older = palloc(sizeof(OlderShape));
			buffer_open_older(output->buffer, key->shape, LockRelationOid,
							  older);
			output->older[key->shape] = older;
			MemoryContextSwitchTo(oldcontext);
		}
		desc = older->desc;
	}
	if (desc != NULL)
		return key_out(desc, key->data, key->keylen);
	bytes = palloc(VARHDRSZ + len);
	SET_VARSIZE(bytes, VARHDRSZ + len);
	memcpy(VARDATA(bytes), key->data, len);
	return cstring_to_text(OidOutputFunctionCall(F_BYTEAOUT, PointerGetDatum(bytes)));
}

/* Put a row of sb_keys() into its result. */
static void
put_key(KeyOutput *output, KeyRow *key)
{
	text	   *name;
	Datum		values[KEY_COLUMNS];
	bool		isnull[KEY_COLUMNS] = {0};
	ClockTime	due_at = key->counted_at;

	/* its count was moved, and the worker has not freed it yet */
	if (is_older(output, key) && key->count == 0 && key->in_flight == 0)
		return;
	name = get_name(output, key);

	values[0] = PointerGetDatum(name);
	isnull[0] = name == NULL;
	values[1] = Int64GetDatum(key->count);
	values[2] = Int64GetDatum(key->in_flight);
	if (due_at != 0 && key->failures == 0)
		due_at += registry_interval(output->buffer->shared);
	set_clock_time(&values[3], &isnull[3], due_at, output->to_timestamp);
	values[4] = Int32GetDatum(key->failures);
	isnull[5] = (key->errorlen < 0 && !is_older(output, key)) ||
		!output->see_all;
	if (key->errorlen < 0)
		values[5] = PointerGetDatum(cstring_to_text(_("the key was counted before the key columns were altered")));
	else
		values[5] = PointerGetDatum(cstring_to_text_with_len(key->data + KEY_LENGTH(key->keylen),
															 key->errorlen));
	tuplestore_putvalues(output->rsinfo->setResult, output->rsinfo->setDesc,
						 values, isnull);
}

/* Put a row of sb_totals() into its result. */
static void
put_total(KeyOutput *output, KeyRow *row)
{
	SbBuffer   *buffer = output->buffer;
	text	   *name = key_out(buffer->shape->desc, row->data, row->keylen);
	KeyBytes	key = {row->data, row->keylen, key_hash(row->data, row->keylen)};
	Datum		values[TOTAL_COLUMNS];
	bool		isnull[TOTAL_COLUMNS] = {0};

	values[0] = PointerGetDatum(name);
	isnull[0] = name == NULL;
	values[1] = Int64GetDatum(total_read(buffer, buffer->shape, &key));
	tuplestore_putvalues(output->rsinfo->setResult, output->rsinfo->setDesc,
						 values, isnull);
}

/*
 * Return the keys that a buffer holds, each as a row that `put' makes.
 *
 * Requires the SELECT privilege; errors are only shown to the owner and to
 * pg_read_all_stats.  Takes AccessShareLock on the buffer.
 *
 * Goes by portions, and keeps no more than one of them in memory: the keys are
 * copied while a partition is locked, and converted without a lock, because
 * that may run user code.  With `totals', keys of older shapes are left out.
 */
static void
return_keys(FunctionCallInfo fcinfo, int ncolumns, bool totals, PutKey put)
{
	Oid			relid = function_buffer_argument(fcinfo, 0);
	KeyOutput	output = {.rsinfo = (ReturnSetInfo *) fcinfo->resultinfo};
	CounterTable table;
	TableScan	scan;
	BufferUse	use;
	List	   *rows = NIL;
	MemoryContext context;
	MemoryContext oldcontext;

	buffer_check_privilege(relid, ACL_SELECT);
	output.see_all = may_see_all(relid);
	output.to_timestamp = clock_to_timestamp();
	InitMaterializedSRF(fcinfo, 0);
	check_columns(fcinfo, output.rsinfo->setDesc, ncolumns);
	output.buffer = buffer_open(relid, AccessShareLock);
	if (totals)
		total_check_target(output.buffer);
	if (!buffer_attach(output.buffer, false))
		return;

	buffer_begin_use(output.buffer, &use);
	table = output.buffer->table;
	if (!totals)
		table.readable = TABLE_ALL_SHAPES;
	output.context = CurrentMemoryContext;
	context = AllocSetContextCreate(CurrentMemoryContext, "statbuffer keys",
									ALLOCSET_DEFAULT_SIZES);
	oldcontext = MemoryContextSwitchTo(context);
	table_begin_scan(&scan, &table, false);
	while (table_visit_portion(&output.buffer->shared->table, &table, &scan,
							   collect_key, &rows))
	{
		ListCell   *lc;

		foreach(lc, rows)
		{
			put(&output, lfirst(lc));
			CHECK_FOR_INTERRUPTS();
		}
		rows = NIL;
		MemoryContextReset(context);
	}
	MemoryContextSwitchTo(oldcontext);
	MemoryContextDelete(context);
	for (int i = 0; i < TABLE_SHAPES; i++)
		if (output.older[i] != NULL)
			buffer_close_older(output.older[i]);
	buffer_end_use(&use);
}

/* sb_get_keys(buffer regclass): the keys that a buffer holds, for sb_keys(). */
Datum
sb_get_keys(PG_FUNCTION_ARGS)
{
	return_keys(fcinfo, KEY_COLUMNS, false, put_key);
	return (Datum) 0;
}

/*
 * sb_get_totals(buffer regclass): for these keys, what is stored and counted, for
 * sb_totals().  Raises an error if the buffer has no target, and those of
 * sb_total().
 */
Datum
sb_get_totals(PG_FUNCTION_ARGS)
{
	return_keys(fcinfo, TOTAL_COLUMNS, true, put_total);
	return (Datum) 0;
}

/*
 * sb_reset_stats(buffer regclass): reset the statistics of a buffer.  Returns
 * true.
 *
 * The caller must own the buffer.  Takes RowShareLock on it.
 */
Datum
sb_reset_stats(PG_FUNCTION_ARGS)
{
	Oid			relid = function_buffer_argument(fcinfo, 0);
	SbBuffer   *buffer;

	buffer_check_owner(relid);
	buffer = buffer_open(relid, RowShareLock);
	if (buffer_attach(buffer, false))
		registry_reset_stats(buffer->shared);
	PG_RETURN_BOOL(true);
}
