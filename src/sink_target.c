/*-------------------------------------------------------------------------
 *
 * sink_target.c
 *	  The sink that stores counts in a column of a table.
 *
 * A batch takes two statements: an UPDATE of the rows that the table has, and
 * if some are missing, an INSERT of these.  An INSERT with ON CONFLICT DO
 * UPDATE alone would do, but it costs more where the row is there, and
 * PostgreSQL checks the constraints of the row that it proposes: a decrease
 * fails CHECK (n >= 0) there though the sum would not.  The INSERT has that
 * clause, too, for rows that others insert at the same time.
 *
 * Where most keys are new, the UPDATE is in vain.  So of a large batch, some keys
 * are updated first, and if few of their rows were there, all others are inserted
 * at once, and so are the next batches; every now and then one is looked at again,
 * to see whether that still is so.  What differs if a row is there all the same
 * is the check of the proposed row: so a batch with a decrease or with one key
 * takes the UPDATE for all, and so does the one that follows a failed one.
 *
 * The statements read the batch as an ephemeral named relation, as a trigger
 * reads a transition table.  Their plans are kept from flush to flush: see
 * target_plan().  For a table of Citus, whose planner does not know such
 * relations, they read it from arrays that are their parameters.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "compat.h"
#include "executor/spi.h"
#include "executor/tuptable.h"
#include "miscadmin.h"
#include "nodes/params.h"
#include "sink.h"
#include "storage/lockdefs.h"
#include "target.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/queryenvironment.h"
#include "utils/tuplestore.h"

/* the name of the batch in the statements, where nothing else can be meant */
#define BATCH				"statbuffer_batch"

/*
 * For how many keys the statements are planned.  Few enough for the planner to
 * take them all for different ones, though it knows nothing of them.
 */
#define PLANNED_KEYS		100

/*
 * So many batches are inserted at once after one of which at most one row in
 * ROWS_PER_UPDATE was there, and so many are updated without a sample after
 * others.
 */
#define BATCHES_ALIKE		15
#define ROWS_PER_UPDATE		16

/* how many keys tell whether the others have rows, and of how many */
#define SAMPLE				64
#define SAMPLED_KEYS		512

typedef struct TargetSink
{
	Sink		sink;
	Target	   *target;
	TupleDesc	keys;			/* the key columns */
	TupleDesc	batch;			/* the columns of the batch */
} TargetSink;

/*
 * A receiver of the rows that an UPDATE returns: the numbers of the keys that
 * it has stored.
 */
typedef struct StoredReceiver
{
	DestReceiver receiver;
	bool	   *stored;			/* by number of the key */
	int			nstored;
} StoredReceiver;

/* Describe the columns of the batch: those of the key, its number, its count. */
static TupleDesc
describe_batch(TupleDesc keys)
{
	int			n = keys->natts;
	TupleDesc	desc = CreateTemplateTupleDesc(n + 2);

	for (int i = 0; i < n; i++)
	{
		Form_pg_attribute att = TupleDescAttr(keys, i);
		char		name[NAMEDATALEN];

		snprintf(name, sizeof(name), "key%d", i + 1);
		TupleDescInitEntry(desc, i + 1, name, att->atttypid, att->atttypmod, 0);
		TupleDescInitEntryCollation(desc, i + 1, att->attcollation);
	}
	TupleDescInitEntry(desc, n + 1, "number", INT4OID, -1, 0);
	TupleDescInitEntry(desc, n + 2, "count", INT8OID, -1, 0);
	TupleDescFinalize(desc);
	return desc;
}

/* Append the assignment that adds an expression to the count column. */
static void
append_addition(StringInfo statement, const Target *target, const char *count)
{
	appendStringInfo(statement,
					 "SET %s = COALESCE(t.%s, 0) OPERATOR(pg_catalog.+) %s",
					 target->count, target->count, count);
}

/* Append what stands for the batch in a FROM clause, with the alias b. */
static void
append_batch(StringInfo statement, const Target *target)
{
	if (!target->distributed)
	{
		appendStringInfoString(statement, BATCH " AS b");
		return;
	}

	/* a subquery, which Citus runs by itself; its columns as in the batch */
	appendStringInfoString(statement, "(SELECT * FROM ROWS FROM (");
	for (int i = 0; i < target->nkeys + 2; i++)
		appendStringInfo(statement, "%spg_catalog.unnest($%d)",
						 i > 0 ? ", " : "", i + 1);
	appendStringInfoString(statement, ") AS u (");
	for (int i = 0; i < target->nkeys; i++)
		appendStringInfo(statement, "key%d, ", i + 1);
	appendStringInfoString(statement, "number, count)) AS b");
}

static char *
update_statement(const Target *target)
{
	StringInfoData statement;

	initStringInfo(&statement);
	appendStringInfo(&statement, "UPDATE %s AS t ", target->name);
	append_addition(&statement, target, "b.count");
	appendStringInfoString(&statement, " FROM ");
	append_batch(&statement, target);
	appendStringInfoString(&statement, " WHERE ");
	target_append_condition(&statement, target, "b.key", NULL);
	appendStringInfoString(&statement, " RETURNING b.number");
	return statement.data;
}

static char *
insert_statement(const Target *target)
{
	const char *names = target_key_names(target);
	StringInfoData statement;

	initStringInfo(&statement);
	appendStringInfo(&statement,
					 "INSERT INTO %s AS t (%s, %s) OVERRIDING SYSTEM VALUE SELECT ",
					 target->name, names, target->count);
	for (int i = 0; i < target->nkeys; i++)
		appendStringInfo(&statement, "b.key%d, ", i + 1);
	appendStringInfoString(&statement, "b.count FROM ");
	append_batch(&statement, target);
	appendStringInfo(&statement, " ON CONFLICT (%s) DO UPDATE ", names);
	append_addition(&statement, target,
					psprintf("EXCLUDED.%s", target->count));
	return statement.data;
}

/*
 * Register keys as the batch that the statements read, without those that are
 * stored.
 */
static void
register_batch(TargetSink *sink, SinkKey *keys, int nkeys,
			   const bool *stored)
{
	EphemeralNamedRelation relation = palloc0(sizeof(EphemeralNamedRelationData));
	TupleDesc	desc = sink->batch;
	int			n = sink->target->nkeys;
	Datum	   *values = palloc(desc->natts * sizeof(Datum));
	bool	   *isnull = palloc0(desc->natts * sizeof(bool));
	Tuplestorestate *store = tuplestore_begin_heap(false, false, work_mem);

	for (int i = 0; i < nkeys; i++)
	{
		if (stored != NULL && stored[i])
			continue;
		memcpy(values, keys[i].values, n * sizeof(Datum));
		memcpy(isnull, keys[i].isnull, n * sizeof(bool));
		values[n] = Int32GetDatum(i);
		values[n + 1] = Int64GetDatum(keys[i].count);
		tuplestore_putvalues(store, desc, values, isnull);
	}

	relation->md.name = BATCH;
	relation->md.reliddesc = InvalidOid;
	relation->md.tupdesc = desc;
	relation->md.enrtype = ENR_NAMED_TUPLESTORE;
	relation->md.enrtuples = PLANNED_KEYS;
	relation->reldata = store;
	if (SPI_register_relation(relation) != SPI_OK_REL_REGISTER)
		elog(ERROR, "could not register the batch");
}

/*
 * Make the parameters that are the batch for a distributed table: arrays of its
 * columns.
 */
static ParamListInfo
make_parameters(TargetSink *sink, SinkKey *keys, int nkeys,
				const bool *stored)
{
	int			n = sink->target->nkeys;
	ParamListInfo params = makeParamList(n + 2);
	SinkKey    *left = palloc(nkeys * sizeof(SinkKey));
	Datum	   *numbers = palloc(nkeys * sizeof(Datum));
	Datum	   *arrays = palloc((n + 1) * sizeof(Datum));
	int			nleft = 0;

	for (int i = 0; i < nkeys; i++)
	{
		if (stored != NULL && stored[i])
			continue;
		left[nleft] = keys[i];
		numbers[nleft++] = Int32GetDatum(i);
	}
	sink_make_arrays(sink->keys, left, nleft, arrays);
	for (int i = 0; i < n + 2; i++)
	{
		params->params[i].isnull = false;
		params->params[i].pflags = PARAM_FLAG_CONST;
		params->params[i].ptype =
			get_array_type(TupleDescAttr(sink->batch, i)->atttypid);
	}
	for (int i = 0; i < n; i++)
		params->params[i].value = arrays[i];
	params->params[n].value =
		PointerGetDatum(construct_array(numbers, nleft, INT4OID, sizeof(int32),
										true, TYPALIGN_INT));
	params->params[n + 1].value = arrays[n];
	return params;
}

/* Prepare a statement, and keep it. */
static void
prepare_statement(const TargetSink *sink, TargetStatement statement)
{
	Target	   *target = sink->target;
	const char *text = statement == TARGET_UPDATE ?
	update_statement(target) : insert_statement(target);
	int			nargs = target->distributed ? sink->batch->natts : 0;
	Oid		   *types = palloc(sink->batch->natts * sizeof(Oid));

	for (int i = 0; i < nargs; i++)
		types[i] = get_array_type(TupleDescAttr(sink->batch, i)->atttypid);
	target_keep(target, statement,
				target_prepare(target, text, nargs, types));
}

/*
 * Run a statement on the keys that are not stored; NULL for all of them.  It is
 * prepared when it is first needed.
 */
static void
run(TargetSink *sink, TargetStatement statement, SinkKey *keys, int nkeys,
	const bool *stored, DestReceiver *receiver)
{
	Target	   *target = sink->target;
	SPIExecuteOptions options = {.dest = receiver};
	int			result;

	if (target->distributed)
		options.params = make_parameters(sink, keys, nkeys, stored);
	else
		register_batch(sink, keys, nkeys, stored);
	if (target->plans[statement] == NULL)
		prepare_statement(sink, statement);
	result = SPI_execute_plan_extended(target_plan(target, statement),
									   &options);
	if (result < 0)
		elog(ERROR, "could not execute statement: %s",
			 SPI_result_code_string(result));
	if (!target->distributed &&
		SPI_unregister_relation(BATCH) != SPI_OK_REL_UNREGISTER)
		elog(ERROR, "could not unregister the batch");
}

/* DestReceiver.receiveSlot: a key was stored. */
static bool
receive_stored(TupleTableSlot *slot, DestReceiver *self)
{
	StoredReceiver *receiver = (StoredReceiver *) self;
	bool		isnull;
	int			number = DatumGetInt32(slot_getattr(slot, 1, &isnull));

	Assert(!isnull);
	if (receiver->stored[number])
		target_report_duplicate();
	receiver->stored[number] = true;
	receiver->nstored++;
	return true;
}

static void
receiver_startup(DestReceiver *self, int operation, TupleDesc desc)
{
}

static void
receiver_end(DestReceiver *self)
{
}

/*
 * May keys of this batch be inserted without looking for their rows first?
 */
static bool
may_insert_at_once(const Target *target, const SinkKey *keys, int nkeys)
{
	if (target->update_first || nkeys == 1)
		return false;
	for (int i = 0; i < nkeys; i++)
		if (keys[i].count < 0)
			return false;
	return true;
}

/* Were so few rows of these keys there that they are better inserted at once? */
static bool
are_new(int nstored, int nkeys)
{
	return nstored <= nkeys / ROWS_PER_UPDATE;
}

/*
 * Add to the rows that are there: to those of a sample of the keys first, and then
 * to the others', unless that seems to be in vain.  Notes in the receiver which
 * ones were stored.  Returns whether most keys are new.
 */
static bool
update_rows(TargetSink *sink, SinkKey *keys, int nkeys, bool sample,
			StoredReceiver *receiver)
{
	bool	   *stored = receiver->stored;
	int			n = sample ? SAMPLE : 0;

	if (sample)
	{
		run(sink, TARGET_UPDATE, keys, n, NULL, &receiver->receiver);
		if (are_new(receiver->nstored, n))
			return true;
	}
	receiver->stored = stored + n;
	run(sink, TARGET_UPDATE, keys + n, nkeys - n, NULL, &receiver->receiver);
	receiver->stored = stored;
	return are_new(receiver->nstored, nkeys);
}

/* SinkMethods.deliver: add to the rows that are there, and insert the others. */
static int
deliver(Sink *sink, SinkKey *keys, int nkeys, SinkProgress progress, void *arg)
{
	TargetSink *target_sink = (TargetSink *) sink;
	Target	   *target = target_sink->target;
	bool		may_insert = may_insert_at_once(target, keys, nkeys);
	int			known = target->alike;
	StoredReceiver receiver = {
		.receiver = {
			.receiveSlot = receive_stored,
			.rStartup = receiver_startup,
			.rShutdown = receiver_end,
			.rDestroy = receiver_end,
			.mydest = DestNone
		},
		.stored = palloc0(nkeys * sizeof(bool))
	};

	if (!progress(0, nkeys, arg))
		return 0;

	/* if this fails, the next one begins with the UPDATE of all */
	target->alike = -1;

	SPI_connect();
	if (known > 0 && may_insert)
	{
		run(target_sink, TARGET_INSERT, keys, nkeys, NULL, NULL);
		known--;
	}
	else
	{
		bool		sample = known == 0 && may_insert && nkeys >= SAMPLED_KEYS;
		bool		are_new_keys = update_rows(target_sink, keys, nkeys, sample,
											   &receiver);

		if (receiver.nstored < nkeys)
			run(target_sink, TARGET_INSERT, keys, nkeys, receiver.stored, NULL);
		if (nkeys > 1 && (known >= 0 || are_new_keys))
			known = are_new_keys ? BATCHES_ALIKE : -BATCHES_ALIKE;
		else if (known < 0)
			known++;
	}
	SPI_finish();
	target->alike = known;
	return nkeys;
}

/* SinkMethods.check: can the target take the counts of the buffer? */
static void
check(const SinkSource *source)
{
	Target	   *target = target_open(source, true, AccessShareLock);

	target_check_privileges(target, source->owner);
	target_note_defaults(target);
}

/*
 * SinkMethods.prepare: find the target.  What fails here is a failure of the
 * buffer, and not of the keys.
 */
static Sink *
prepare(const SinkSource *source)
{
	TargetSink *sink = palloc0(sizeof(TargetSink));

	sink->sink.methods = &sink_target;
	PreventCommandIfReadOnly("UPDATE");
	sink->target = target_open(source, true, RowExclusiveLock);
	target_check_privileges(sink->target, source->owner);
	sink->keys = source->desc;
	sink->batch = describe_batch(source->desc);
	return &sink->sink;
}

const SinkMethods sink_target = {
	.check = check,
	.prepare = prepare,
	.deliver = deliver
};
