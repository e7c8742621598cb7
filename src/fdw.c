/*-------------------------------------------------------------------------
 *
 * fdw.c
 *	  The foreign table: scan, insert, truncate.
 *
 * A scan copies all rows before it returns the first, because it cannot hold
 * the locks of the table of counters between rows.  The rows are the keys with
 * a count that is not stored yet, including what the transaction itself has
 * added.
 *
 * Functions that are assigned in statbuffer_fdw_handler() implement the FDW
 * callback that their comment names; "FDW Callback Routines" in PostgreSQL's
 * documentation says when they are called.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "buffer.h"
#include "catalog/pg_foreign_data_wrapper.h"
#include "catalog/pg_foreign_server.h"
#include "catalog/pg_foreign_table.h"
#include "commands/defrem.h"
#include "compat.h"
#include "counters.h"
#include "executor/executor.h"
#include "fdw.h"
#include "foreign/fdwapi.h"
#include "foreign/foreign.h"
#include "miscadmin.h"
#include "optimizer/cost.h"
#include "optimizer/optimizer.h"
#include "optimizer/planmain.h"
#include "optimizer/restrictinfo.h"
#include "pending.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"

COMPAT_FUNCTION_INFO_V1(statbuffer_fdw_handler);

/* size of the blocks into which the rows of a scan are copied */
#define SCAN_BLOCK_SIZE		(256 * 1024)

typedef struct ScanRow
{
	int64		count;
	uint16		keylen;
	char		key[FLEXIBLE_ARRAY_MEMBER];
} ScanRow;

typedef struct ScanBlock
{
	struct ScanBlock *next;
	Size		used;
	char		data[FLEXIBLE_ARRAY_MEMBER];
} ScanBlock;

typedef struct BufferScan
{
	SbBuffer   *buffer;
	const BufferShape *shape;	/* of the rows */
	BufferUse	use;
	bool		filled;
	MemoryContext context;		/* of the rows */
	MemoryContext row_context;	/* of the row last returned */
	ScanBlock  *first;
	ScanBlock  *last;
	uint64		nrows;

	/* position of the next row */
	ScanBlock  *block;
	Size		offset;
} BufferScan;

typedef struct BufferInsert
{
	PendingTarget target;
	Oid			userid;			/* whose privileges count; may be a view's
								 * owner */
	const BufferShape *shape;
	Datum	   *values;
	bool	   *isnull;
	MemoryContext row_context;
	KeySpace	space;
} BufferInsert;

/* ------------------------------------------------------------------------
 * Scan
 * ------------------------------------------------------------------------
 */

/*
 * GetForeignRelSize: estimate the number of rows from the number of keys held.
 * Takes AccessShareLock on the buffer.
 */
static void
get_rel_size(PlannerInfo *root, RelOptInfo *rel, Oid relid)
{
	SbBuffer   *buffer = buffer_open(relid, AccessShareLock);

	rel->tuples = 0;
	if (buffer_attach(buffer, false))
		rel->tuples = table_nkeys(&buffer->shared->table);
	rel->rows = clamp_row_est(rel->tuples *
							  clauselist_selectivity(root,
													 rel->baserestrictinfo,
													 0, JOIN_INNER, NULL));
}

/* GetForeignPaths: there is only one path, a full scan. */
static void
get_paths(PlannerInfo *root, RelOptInfo *rel, Oid relid)
{
	/* all rows are copied before the first is returned */
	Cost		startup = cpu_operator_cost * rel->tuples;
	Cost		total = startup + (cpu_tuple_cost +
								   rel->baserestrictcost.per_tuple) * rel->tuples;

	add_path(rel, (Path *) compat_create_foreignscan_path(root, rel,
														  rel->rows, startup,
														  total));
}

/* GetForeignPlan: the executor checks all conditions. */
static ForeignScan *
get_plan(PlannerInfo *root, RelOptInfo *rel, Oid relid,
		 ForeignPath *best_path, List *tlist, List *scan_clauses,
		 Plan *outer_plan)
{
	return make_foreignscan(tlist, extract_actual_clauses(scan_clauses, false),
							rel->relid, NIL, NIL, NIL, NIL, outer_plan);
}

/*
 * BeginForeignScan: open the buffer, but copy nothing yet.  Takes
 * AccessShareLock on the buffer.
 */
static void
begin_scan(ForeignScanState *node, int eflags)
{
	BufferScan *state;

	if (eflags & EXEC_FLAG_EXPLAIN_ONLY)
		return;

	state = palloc0(sizeof(BufferScan));
	state->buffer = buffer_open(RelationGetRelid(node->ss.ss_currentRelation),
								AccessShareLock);
	state->shape = state->buffer->shape;
	state->context = AllocSetContextCreate(CurrentMemoryContext,
										   "statbuffer scan",
										   ALLOCSET_DEFAULT_SIZES);
	state->row_context = AllocSetContextCreate(CurrentMemoryContext,
											   "statbuffer scan row",
											   ALLOCSET_DEFAULT_SIZES);

	/* keep the types as they are until the scan ends */
	buffer_begin_use(state->buffer, &state->use);
	node->fdw_state = state;
}

/* Append a row to the scan, unless its count is 0. */
static void
add_row(BufferScan *state, const char *key, uint16 keylen, int64 count)
{
	Size		size = MAXALIGN(offsetof(ScanRow, key) + KEY_LENGTH(keylen));
	ScanRow    *row;

	if (count == 0)
		return;
	if (state->last == NULL || state->last->used + size > SCAN_BLOCK_SIZE)
	{
		ScanBlock  *block;

		block = MemoryContextAlloc(state->context,
								   offsetof(ScanBlock, data) + SCAN_BLOCK_SIZE);
		block->next = NULL;
		block->used = 0;
		if (state->last)
			state->last->next = block;
		else
			state->first = block;
		state->last = block;
	}
	row = (ScanRow *) (state->last->data + state->last->used);
	row->count = count;
	row->keylen = keylen;
	memcpy(row->key, key, KEY_LENGTH(keylen));
	state->last->used += size;
	state->nrows++;
}

/* Copy a shared key: a CounterVisitor. */
static void
visit_counter(const CounterInfo *info, void *arg)
{
	add_row(arg, info->key, info->keylen, info->count + info->in_flight);
}

/* Copy a key of the transaction: a PendingVisitor. */
static void
visit_pending(const KeyBytes *key, int64 delta, void *arg)
{
	add_row(arg, key->data, key->len, delta);
}

/* Add the transaction's own increments to the rows. */
static void
add_pending(BufferScan *state)
{
	SbBuffer   *buffer = state->buffer;
	uint64		scan = pending_begin_scan();

	for (ScanBlock *block = state->first; block; block = block->next)
	{
		for (Size offset = 0; offset < block->used;)
		{
			ScanRow    *row = (ScanRow *) (block->data + offset);
			KeyBytes	key = {row->key, row->keylen,
			key_hash(row->key, row->keylen)};
			int64		delta;

			if (pending_scan_key(buffer, &key, scan, &delta))
				row->count = DatumGetInt64(DirectFunctionCall2(int8pl,
															   Int64GetDatum(row->count),
															   Int64GetDatum(delta)));
			offset += MAXALIGN(offsetof(ScanRow, key) +
							   KEY_LENGTH(row->keylen));
		}
	}
	pending_scan_rest(buffer, scan, visit_pending, state);
}

/*
 * Copy the keys and counts.  Raises an error if the transaction has altered
 * the key columns since the scan began.  The scan may be planned and started,
 * but only run after the buffer's columns were dropped with their types.
 */
static void
fill(BufferScan *state)
{
	SbBuffer   *buffer = state->buffer;

	state->filled = true;
	if (!buffer_revalidate(buffer))
		return;
	buffer_check_shape(buffer, state->shape);
	if (buffer_attach(buffer, false) && !pending_truncated(buffer))
		table_visit(&buffer->shared->table, &buffer->table, visit_counter, state);
	if (buffer->pending != NULL)
		add_pending(state);
	state->block = state->first;
	state->offset = 0;
}

/* IterateForeignScan: return the next row.  The first call copies them all. */
static TupleTableSlot *
iterate_scan(ForeignScanState *node)
{
	BufferScan *state = node->fdw_state;
	TupleTableSlot *slot = node->ss.ss_ScanTupleSlot;
	const BufferShape *shape = state->shape;
	TupleDesc	desc = shape->desc;
	MemoryContext oldcontext;
	Datum	   *values;
	bool	   *isnull;
	ScanRow    *row;

	if (!state->filled)
		fill(state);

	ExecClearTuple(slot);
	do
	{
		while (state->block != NULL && state->offset >= state->block->used)
		{
			state->block = state->block->next;
			state->offset = 0;
		}
		if (state->block == NULL)
			return slot;
		row = (ScanRow *) (state->block->data + state->offset);
		state->offset += MAXALIGN(offsetof(ScanRow, key) +
								  KEY_LENGTH(row->keylen));

		/* skip keys whose sum with our own increments is 0 */
	} while (row->count == 0);

	MemoryContextReset(state->row_context);
	oldcontext = MemoryContextSwitchTo(state->row_context);
	values = palloc(desc->natts * sizeof(Datum));
	isnull = palloc(desc->natts * sizeof(bool));
	key_deform(desc, row->key, row->keylen, values, isnull);
	MemoryContextSwitchTo(oldcontext);

	/* dropped columns are null */
	memset(slot->tts_isnull, true, slot->tts_tupleDescriptor->natts);
	for (int i = 0; i < desc->natts; i++)
	{
		slot->tts_values[shape->key_attnos[i] - 1] = values[i];
		slot->tts_isnull[shape->key_attnos[i] - 1] = isnull[i];
	}
	slot->tts_values[shape->count_attno - 1] = Int64GetDatum(row->count);
	slot->tts_isnull[shape->count_attno - 1] = false;
	return ExecStoreVirtualTuple(slot);
}

/*
 * ReScanForeignScan: return the same rows again, because a statement sees one
 * state of the buffer.
 */
static void
rescan(ForeignScanState *node)
{
	BufferScan *state = node->fdw_state;

	state->block = state->first;
	state->offset = 0;
}

/* EndForeignScan: free the rows. */
static void
end_scan(ForeignScanState *node)
{
	BufferScan *state = node->fdw_state;

	if (state != NULL)
	{
		buffer_end_use(&state->use);
		MemoryContextDelete(state->context);
		MemoryContextDelete(state->row_context);
	}
}

/* ExplainForeignScan: with ANALYZE, show how many keys were copied. */
static void
explain_scan(ForeignScanState *node, ExplainState *es)
{
	BufferScan *state = node->fdw_state;

	ExplainPropertyText("Statbuffer", "live counts in shared memory", es);
	if (es->analyze && state != NULL)
		ExplainPropertyInteger("Keys Copied", NULL, state->nrows, es);
}

/* ------------------------------------------------------------------------
 * Insert
 * ------------------------------------------------------------------------
 */

/* Open the buffer for counting, and allocate space for the key columns. */
static void
open_for_insert(BufferInsert *state, Oid relid)
{
	int			natts;

	pending_open(&state->target, relid, false);
	state->shape = state->target.buffer->shape;
	natts = state->shape->desc->natts;
	state->values = repalloc(state->values, natts * sizeof(Datum));
	state->isnull = repalloc(state->isnull, natts * sizeof(bool));
}

/*
 * BeginForeignInsert: open the buffer for INSERT, COPY, or rows that are
 * routed to a partition.  Takes RowExclusiveLock on the buffer.  Raises an
 * error if it is stopped.
 */
static void
begin_insert(ModifyTableState *mtstate, ResultRelInfo *rinfo)
{
	BufferInsert *state = palloc0(sizeof(BufferInsert));

	state->values = palloc(sizeof(Datum));
	state->isnull = palloc(sizeof(bool));
	open_for_insert(state, RelationGetRelid(rinfo->ri_RelationDesc));
	state->row_context = AllocSetContextCreate(CurrentMemoryContext,
											   "statbuffer insert row",
											   ALLOCSET_DEFAULT_SIZES);
	rinfo->ri_FdwState = state;
}

/* BeginForeignModify: open the buffer, unless this is EXPLAIN. */
static void
begin_modify(ModifyTableState *mtstate, ResultRelInfo *rinfo,
			 List *fdw_private, int subplan_index, int eflags)
{
	if ((eflags & EXEC_FLAG_EXPLAIN_ONLY) == 0)
		begin_insert(mtstate, rinfo);
}

/*
 * Raise the error that the count is null.
 *
 * If the statement has left out the count column, the default comes from the
 * relation that the statement names.  If that is a foreign table of another
 * server or a partitioned table, it may have none even though the buffer has
 * one.
 */
static void
report_null_count(TupleDesc desc, SbBuffer *buffer)
{
	Form_pg_attribute att = TupleDescAttr(desc, buffer->shape->count_attno - 1);

	ereport(ERROR,
			(errcode(ERRCODE_NOT_NULL_VIOLATION),
			 errmsg("null value in count column \"%s\" of buffer \"%s\"",
					NameStr(att->attname), NameStr(buffer->name)),
			 att->atthasdef ?
			 errhint("Omit the column to count its default. If it was omitted from a foreign table or partitioned table that leads to this buffer, define the column with DEFAULT 1 there.") :
			 errhint("Specify a count, or define the column with DEFAULT 1.")));
}

/*
 * ExecForeignInsert: add a row's count to its key, as sb_increment() does.
 * Raises the errors of key_form() and pending_add(), or if the count is null.
 */
static TupleTableSlot *
insert_row(EState *estate, ResultRelInfo *rinfo, TupleTableSlot *slot,
		   TupleTableSlot *plan_slot)
{
	BufferInsert *state = rinfo->ri_FdwState;
	const BufferShape *shape;
	SbBuffer   *buffer;
	MemoryContext oldcontext;
	KeyBytes	key;
	Datum		count;
	bool		isnull;

	if (state->target.generation != buffer_generation)
		open_for_insert(state, RelationGetRelid(rinfo->ri_RelationDesc));
	if (!OidIsValid(state->userid))
		state->userid = compat_result_user(rinfo, estate);
	buffer = state->target.buffer;
	shape = state->shape;

	count = slot_getattr(slot, shape->count_attno, &isnull);
	if (isnull)
		report_null_count(RelationGetDescr(rinfo->ri_RelationDesc), buffer);
	for (int i = 0; i < shape->desc->natts; i++)
		state->values[i] = slot_getattr(slot, shape->key_attnos[i],
										&state->isnull[i]);

	MemoryContextReset(state->row_context);
	oldcontext = MemoryContextSwitchTo(state->row_context);
	key_form(shape->desc, NameStr(buffer->name), state->values,
			 state->isnull, &state->space, &key);
	(void) pending_add(buffer, shape, &key, DatumGetInt64(count),
					   state->userid);
	MemoryContextSwitchTo(oldcontext);
	return slot;
}

/* ExplainForeignModify: show what an INSERT does. */
static void
explain_modify(ModifyTableState *mtstate, ResultRelInfo *rinfo,
			   List *fdw_private, int subplan_index, ExplainState *es)
{
	ExplainPropertyText("Statbuffer", "increments, published at commit", es);
}

/*
 * ExecForeignTruncate: discard what buffers hold, when the transaction
 * commits.  Core has checked privileges and taken AccessExclusiveLock.
 */
static void
truncate_buffers(List *rels, DropBehavior behavior, bool restart_seqs)
{
	ListCell   *lc;

	foreach(lc, rels)
		pending_truncate(buffer_open(RelationGetRelid((Relation) lfirst(lc)),
									 AccessExclusiveLock));
}

/* ------------------------------------------------------------------------
 * SQL functions
 * ------------------------------------------------------------------------
 */

/*
 * statbuffer_fdw_handler(): the handler function of the foreign-data wrapper.
 * Returns its callbacks.
 */
Datum
statbuffer_fdw_handler(PG_FUNCTION_ARGS)
{
	FdwRoutine *routine = makeNode(FdwRoutine);

	routine->GetForeignRelSize = get_rel_size;
	routine->GetForeignPaths = get_paths;
	routine->GetForeignPlan = get_plan;
	routine->BeginForeignScan = begin_scan;
	routine->IterateForeignScan = iterate_scan;
	routine->ReScanForeignScan = rescan;
	routine->EndForeignScan = end_scan;
	routine->ExplainForeignScan = explain_scan;

	routine->BeginForeignModify = begin_modify;
	routine->ExecForeignInsert = insert_row;
	routine->BeginForeignInsert = begin_insert;
	routine->IsForeignRelUpdatable = buffer_updatable;
	routine->ExplainForeignModify = explain_modify;
	routine->ExecForeignTruncate = truncate_buffers;

	PG_RETURN_POINTER(routine);
}

/*
 * Has a statement used foreign tables that are not buffers?  Must be called
 * before the executor ends.
 */
bool
fdw_others_used(EState *estate)
{
	ListCell   *lc;

	for (Index i = 0; i < estate->es_range_table_size; i++)
	{
		Relation	rel = estate->es_relations[i];

		if (rel != NULL && rel->rd_rel->relkind == RELKIND_FOREIGN_TABLE &&
			(rel->rd_fdwroutine == NULL ||
			 rel->rd_fdwroutine->IsForeignRelUpdatable != buffer_updatable))
			return true;
	}

	/* partitions that rows were routed to */
	foreach(lc, estate->es_tuple_routing_result_relations)
	{
		ResultRelInfo *rinfo = lfirst(lc);

		if (rinfo->ri_FdwRoutine != NULL &&
			rinfo->ri_FdwRoutine->IsForeignRelUpdatable != buffer_updatable)
			return true;
	}
	return false;
}
