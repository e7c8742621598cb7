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
#include "standby.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"

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

/* how many keys the planner expects on a standby, where counting them is costly */
#define STANDBY_KEYS	1000

typedef struct BufferScan
{
	SbBuffer   *buffer;
	const BufferShape *shape;	/* of the rows */
	BufferUse	use;
	bool		needs_keys;		/* a key column is used */
	bool		started;
	MemoryContext context;		/* of the rows */
	MemoryContext row_context;	/* of the row last returned */
	ScanBlock  *first;
	ScanBlock  *last;
	uint64		nrows;

	/* where more rows come from */
	bool		more;
	SharedBuffer *shared;
	CounterTable table;
	TableScan	scan;

	/* position of the next row */
	ScanBlock  *block;			/* NULL: before the first */
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
	if (standby_applies(buffer))
		rel->tuples = STANDBY_KEYS;
	else if (buffer_attach(buffer, false))
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
	Cost		total = (cpu_operator_cost + cpu_tuple_cost +
						 rel->baserestrictcost.per_tuple) * rel->tuples;

	add_path(rel, (Path *) compat_create_foreignscan_path(root, rel,
														  rel->rows, 0,
														  total));
}

/* Is a column other than the last one, the count, used? */
static bool
uses_keys(PlannerInfo *root, RelOptInfo *rel, Oid relid, List *clauses)
{
	int			count_attno = buffer_open(relid, NoLock)->shape->count_attno;
	Bitmapset  *used = NULL;
	int			attno = -1;

	pull_varattnos((Node *) rel->reltarget->exprs, rel->relid, &used);
	pull_varattnos((Node *) clauses, rel->relid, &used);
	while ((attno = bms_next_member(used, attno)) >= 0)
	{
		int			column = attno + FirstLowInvalidHeapAttributeNumber;

		/* 0 is the whole row */
		if (column >= 0 && column != count_attno)
			return true;
	}
	return false;
}

/*
 * GetForeignPlan: the executor checks all conditions.  Tells the scan whether
 * key columns are needed.
 */
static ForeignScan *
get_plan(PlannerInfo *root, RelOptInfo *rel, Oid relid,
		 ForeignPath *best_path, List *tlist, List *scan_clauses,
		 Plan *outer_plan)
{
	List	   *clauses = extract_actual_clauses(scan_clauses, false);
	bool		needs_keys = uses_keys(root, rel, relid, clauses);

	return make_foreignscan(tlist, clauses, rel->relid, NIL,
							list_make1(makeInteger(needs_keys)), NIL, NIL,
							outer_plan);
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
	state->needs_keys =
		intVal(linitial(((ForeignScan *) node->ss.ps.plan)->fdw_private)) != 0;
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

static Size
row_size(uint16 keylen)
{
	return MAXALIGN(offsetof(ScanRow, key) + KEY_LENGTH(keylen));
}

/* Append a row to the scan, unless its count is 0. */
static void
add_row(BufferScan *state, const char *key, uint16 keylen, int64 count)
{
	Size		size;
	ScanRow    *row;

	if (count == 0)
		return;
	if (!state->needs_keys)
		keylen = 0;
	size = row_size(keylen);
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

/* Copy a key that the ledger has: a StandbyVisitor. */
static void
visit_standby(const KeyBytes *key, int64 count, void *arg)
{
	add_row(arg, key->data, key->len, count);
}

/* On a standby: copy all rows from the ledger. */
static void
copy_ledger(BufferScan *state)
{
	MemoryContext context = AllocSetContextCreate(CurrentMemoryContext,
												  "statbuffer standby",
												  ALLOCSET_DEFAULT_SIZES);
	MemoryContext oldcontext = MemoryContextSwitchTo(context);
	Snapshot	snapshot;
	StandbyCounts *counts = standby_read(state->buffer, &snapshot);

	UnregisterSnapshot(snapshot);
	standby_visit(counts, visit_standby, state);
	MemoryContextSwitchTo(oldcontext);
	MemoryContextDelete(context);
}

/* Add the transaction's own increments to the rows. */
static void
add_pending(BufferScan *state)
{
	SbBuffer   *buffer = state->buffer;

	pending_begin_scan(buffer);
	for (ScanBlock *block = state->first; block; block = block->next)
	{
		for (Size offset = 0; offset < block->used;)
		{
			ScanRow    *row = (ScanRow *) (block->data + offset);
			KeyBytes	key = {row->key, row->keylen,
			key_hash(row->key, row->keylen)};
			int64		delta;

			if (pending_scan_key(buffer, &key, &delta))
				row->count = DatumGetInt64(DirectFunctionCall2(int8pl,
															   Int64GetDatum(row->count),
															   Int64GetDatum(delta)));
			offset += row_size(row->keylen);
		}
	}
	pending_scan_rest(buffer, visit_pending, state);
}

/* Copy the next portion of the rows.  Returns false if there are no more. */
static bool
fetch_portion(BufferScan *state)
{
	CHECK_FOR_INTERRUPTS();
	state->more = state->more &&
		table_visit_portion(&state->shared->table, &state->table, &state->scan,
							visit_counter, state);
	return state->more;
}

/*
 * Start to copy rows.  Raises an error if the transaction has altered the key
 * columns since the scan began.  The scan may be planned and started, but only
 * run after the buffer's columns were dropped with their types.
 *
 * If the transaction itself has counted in the buffer, all rows are copied at
 * once, because what it counts while the scan runs must not be seen.
 */
static void
start(BufferScan *state)
{
	SbBuffer   *buffer = state->buffer;

	state->started = true;
	if (!buffer_revalidate(buffer))
		return;
	buffer_check_shape(buffer, state->shape);
	if (standby_applies(buffer))
	{
		copy_ledger(state);
		return;
	}
	if (buffer_attach(buffer, false) && !pending_truncated(buffer))
	{
		state->shared = buffer->shared;
		state->table = buffer->table;
		table_begin_scan(&state->scan, &state->table, false);
		state->more = true;
	}
	if (buffer->pending == NULL)
		return;
	state->needs_keys = true;
	while (fetch_portion(state))
		;
	add_pending(state);
}

/* Get the next row, or NULL. */
static ScanRow *
next_row(BufferScan *state)
{
	for (;;)
	{
		ScanBlock  *block = state->block;

		if (block != NULL && state->offset < block->used)
		{
			ScanRow    *row = (ScanRow *) (block->data + state->offset);

			state->offset += row_size(row->keylen);
			return row;
		}
		if (block == NULL ? state->first != NULL : block->next != NULL)
		{
			state->block = block == NULL ? state->first : block->next;
			state->offset = 0;
		}
		else if (!fetch_portion(state))
			return NULL;
	}
}

/* IterateForeignScan: return the next row. */
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

	if (!state->started)
		start(state);

	ExecClearTuple(slot);
	do
	{
		row = next_row(state);
		if (row == NULL)
			return slot;

		/* skip keys whose sum with our own increments is 0 */
	} while (row->count == 0);

	/* dropped columns, and those that are not used, are null */
	memset(slot->tts_isnull, true, slot->tts_tupleDescriptor->natts);
	slot->tts_values[shape->count_attno - 1] = Int64GetDatum(row->count);
	slot->tts_isnull[shape->count_attno - 1] = false;
	if (!state->needs_keys)
		return ExecStoreVirtualTuple(slot);

	MemoryContextReset(state->row_context);
	oldcontext = MemoryContextSwitchTo(state->row_context);
	values = palloc(desc->natts * sizeof(Datum));
	isnull = palloc(desc->natts * sizeof(bool));
	key_deform(desc, row->key, row->keylen, values, isnull);
	MemoryContextSwitchTo(oldcontext);

	for (int i = 0; i < desc->natts; i++)
	{
		slot->tts_values[shape->key_attnos[i] - 1] = values[i];
		slot->tts_isnull[shape->key_attnos[i] - 1] = isnull[i];
	}
	return ExecStoreVirtualTuple(slot);
}

/*
 * ReScanForeignScan: return the same rows again, because a statement sees each
 * key in one state.
 */
static void
rescan(ForeignScanState *node)
{
	BufferScan *state = node->fdw_state;

	state->block = NULL;
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
 * Get the hint for a null count in a row that was inserted into a relation: the
 * buffer, or a partitioned table from which the row was routed to it.  If that
 * relation's column has no default, the statement may have omitted it.
 *
 * Otherwise it may have been omitted from a foreign table of another server,
 * which has a default of its own, or none.
 */
static int
null_count_hint(Relation rel, const char *column)
{
	AttrNumber	attno = get_attnum(RelationGetRelid(rel), column);

	if (attno != InvalidAttrNumber &&
		!TupleDescAttr(RelationGetDescr(rel), attno - 1)->atthasdef)
		return errhint("Define column \"%s\" of \"%s\" with DEFAULT 1, or specify a count.",
					   column, RelationGetRelationName(rel));
	return errhint("Omit the column to count its default. If it was omitted from a foreign table of another server that leads to this buffer, define the column with DEFAULT 1 there.");
}

/* Raise the error that the count is null. */
static void
report_null_count(ResultRelInfo *rinfo, SbBuffer *buffer)
{
	Form_pg_attribute att = TupleDescAttr(RelationGetDescr(rinfo->ri_RelationDesc),
										  buffer->shape->count_attno - 1);

	ereport(ERROR,
			(errcode(ERRCODE_NOT_NULL_VIOLATION),
			 errmsg("null value in count column \"%s\" of buffer \"%s\"",
					NameStr(att->attname), NameStr(buffer->name)),
			 null_count_hint(rinfo->ri_RootResultRelInfo ?
							 rinfo->ri_RootResultRelInfo->ri_RelationDesc :
							 rinfo->ri_RelationDesc,
							 NameStr(att->attname))));
}

/*
 * Add to a key that is one text, if its stored form has a short header.  Returns
 * false if not.
 */
static inline bool
add_text(BufferInsert *state, int64 count)
{
	Size		len;
	const char *text = key_get_text(state->values[0], &len);

	if (unlikely(len > KEY_SHORT_TEXT))
		return false;
	(void) pending_add_text(&state->target, text, len, count);
	return true;
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
	Datum		count;
	bool		isnull;

	if (state->target.generation != buffer_generation)
		open_for_insert(state, RelationGetRelid(rinfo->ri_RelationDesc));
	if (!OidIsValid(state->userid))
		state->userid = compat_result_user(rinfo, estate);
	state->target.userid = state->userid;
	buffer = state->target.buffer;
	shape = state->shape;

	count = slot_getattr(slot, shape->count_attno, &isnull);
	if (isnull)
		report_null_count(rinfo, buffer);
	for (int i = 0; i < shape->desc->natts; i++)
		state->values[i] = slot_getattr(slot, shape->key_attnos[i],
										&state->isnull[i]);

	MemoryContextReset(state->row_context);
	oldcontext = MemoryContextSwitchTo(state->row_context);
	if (!shape->is_text || state->isnull[0] ||
		!add_text(state, DatumGetInt64(count)))
	{
		KeyBytes	key;

		key_form(shape->desc, NameStr(buffer->name), state->values,
				 state->isnull, &state->space, &key);
		(void) pending_add(&state->target, shape, &key, DatumGetInt64(count));
	}
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
 * AddForeignUpdateTargets: raise the error that a buffer cannot be updated or
 * deleted from, in place of core's, which has no hint.  The planner calls this.
 *
 * If the statement names a table of which the buffer is a partition, it is left
 * to the executor: it may not get to this partition.
 */
static void
refuse_change(PlannerInfo *root, Index rtindex, RangeTblEntry *target_rte,
			  Relation rel)
{
	if ((int) rtindex != root->parse->resultRelation)
		return;
	ereport(ERROR,
			(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
			 root->parse->commandType == CMD_DELETE ?
			 errmsg("cannot delete from buffer \"%s\"",
					RelationGetRelationName(rel)) :
			 errmsg("cannot update buffer \"%s\"",
					RelationGetRelationName(rel)),
			 errhint("Use INSERT to increment keys, with a negative count to decrease them, and TRUNCATE to discard all counts. UPDATE and DELETE work on a view that sb_create_view() creates.")));
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

	routine->AddForeignUpdateTargets = refuse_change;
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
