/*-------------------------------------------------------------------------
 *
 * trigger.c
 *	  sb_trigger(): keeps counts of a table's rows by the values of columns.
 *
 * The trigger's arguments are a buffer and the columns that are its key.  A
 * row that comes counts 1 for its key, a row that goes -1, and a row whose key
 * changes both.  Row by row, or for a statement by its transition tables.
 *
 * What is counted is part of the transaction, as by sb_increment(), and needs
 * what that needs: whoever changes the table counts, with his own privileges.
 *
 * What a trigger's definition means is found out once a statement, and kept in
 * fn_extra: the executor has one for each trigger of each table, as long as
 * the statement runs, during which the table can't be altered.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "buffer.h"
#include "catalog/namespace.h"
#include "commands/trigger.h"
#include "compat.h"
#include "executor/executor.h"
#include "executor/tuptable.h"
#include "key.h"
#include "miscadmin.h"
#include "parser/parse_coerce.h"
#include "parser/parse_relation.h"
#include "pending.h"
#include "utils/builtins.h"
#include "utils/datum.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/tuplestore.h"

COMPAT_FUNCTION_INFO_V1(sb_trigger);

/* A key as it stands in a row, or, after key_read_columns(), in the buffer. */
typedef struct RowKey
{
	Datum	   *values;
	bool	   *isnull;
} RowKey;

typedef struct TriggerCache
{
	PendingTarget target;		/* `last' only for one of the two kinds below */

	/* where the key is, for this shape, found out in this generation */
	uint64		key_generation;
	MemoryContext key_context;	/* what follows lives in */
	const BufferShape *shape;
	int			ncolumns;
	AttrNumber *attnos;			/* NULL: not found out yet */
	KeyReader  *reader;
	bool		runs_code;		/* key_reader_runs_code() */
	bool		is_text;		/* one column, text in both */
	bool		is_byval;		/* one column, passed by value */
	RowKey		old;
	RowKey		new;

	Datum		last_value;		/* the key of target.last, if by value */
} TriggerCache;

/* What an error is about. */
typedef struct TriggerErrorContext
{
	TriggerData *trigdata;
	int			argno;			/* an argument, from 1 on; 0: none of them */
} TriggerErrorContext;

/* Every error, from whichever room it comes, names trigger and table. */
static void
add_error_context(void *arg)
{
	TriggerErrorContext *context = arg;
	Trigger    *trigger = context->trigdata->tg_trigger;
	const char *relname = RelationGetRelationName(context->trigdata->tg_relation);

	if (context->argno > 0)
		errcontext("argument %d, \"%s\", of trigger \"%s\" on table \"%s\"",
				   context->argno, trigger->tgargs[context->argno - 1],
				   trigger->tgname, relname);
	else
		errcontext("trigger \"%s\" on table \"%s\"", trigger->tgname, relname);
}

/* ------------------------------------------------------------------------
 * The trigger's definition
 * ------------------------------------------------------------------------
 */

/* Can we count what this event does?  Raises an error when not. */
static void
check_event(TriggerData *trigdata)
{
	TriggerEvent event = trigdata->tg_event;

	if (TRIGGER_FIRED_BY_TRUNCATE(event))
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("cannot truncate table \"%s\" because trigger \"%s\" counts its rows",
						RelationGetRelationName(trigdata->tg_relation),
						trigdata->tg_trigger->tgname),
				 errdetail("TRUNCATE does not look at the rows that it removes, so they can't be counted down."),
				 errhint("Use DELETE. Or disable the trigger for the TRUNCATE, and set what is counted and stored to what it shall be.")));

	/* before the event, other triggers may yet change or prevent it */
	if (!TRIGGER_FIRED_AFTER(event))
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("function \"%s\" must be fired AFTER", "sb_trigger"),
				 errhint("Create the trigger with AFTER instead of BEFORE or INSTEAD OF.")));
}

/* Has a statement-level trigger the transition tables that it needs? */
static void
check_transition_tables(TriggerData *trigdata)
{
	TriggerEvent event = trigdata->tg_event;

	if ((trigdata->tg_oldtable == NULL && !TRIGGER_FIRED_BY_INSERT(event)) ||
		(trigdata->tg_newtable == NULL && !TRIGGER_FIRED_BY_DELETE(event)))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_OBJECT_DEFINITION),
				 errmsg("trigger \"%s\" on table \"%s\" lacks a transition table",
						trigdata->tg_trigger->tgname,
						RelationGetRelationName(trigdata->tg_relation)),
				 TRIGGER_FIRED_BY_INSERT(event) ?
				 errhint("Create the trigger with REFERENCING NEW TABLE AS ..., or FOR EACH ROW.") :
				 TRIGGER_FIRED_BY_DELETE(event) ?
				 errhint("Create the trigger with REFERENCING OLD TABLE AS ..., or FOR EACH ROW.") :
				 errhint("Create the trigger with REFERENCING OLD TABLE AS ... NEW TABLE AS ..., or FOR EACH ROW.")));
}

/* The relation that the first argument names; the name is parsed as SQL's. */
static Oid
find_buffer(const char *name)
{
	RangeVar   *range_var;
	Oid			relid;

	range_var = makeRangeVarFromNameList(compat_qualified_name_list(name));
	relid = RangeVarGetRelid(range_var, NoLock, true);
	if (!OidIsValid(relid))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_TABLE),
				 errmsg("relation \"%s\" does not exist", name),
				 errhint("The first argument of sb_trigger() is the buffer. Give its schema, too, so that it is found whatever the search path.")));
	return relid;
}

/* The column that an argument names, literally. */
static Form_pg_attribute
find_column(Relation rel, const char *name)
{
	AttrNumber	attno = attnameAttNum(rel, name, true);
	Form_pg_attribute att;

	if (attno == InvalidAttrNumber)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_COLUMN),
				 errmsg("column \"%s\" of relation \"%s\" does not exist",
						name, RelationGetRelationName(rel)),
				 errhint("The arguments of sb_trigger() after the first are columns of the table, written as they are stored: without quotes, in upper and lower case.")));
	if (attno < 0)
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("cannot count by system column \"%s\"", name)));
	att = TupleDescAttr(RelationGetDescr(rel), attno - 1);
	if (att->attgenerated == ATTRIBUTE_GENERATED_VIRTUAL)
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("cannot count by virtual generated column \"%s\"",
						name),
				 errdetail("Its values are not computed for triggers.")));
	return att;
}

/*
 * Can values of a column be counted as values of a key column?  Raises an error
 * if not.
 */
static void
check_key_column(Relation rel, Form_pg_attribute att, SbBuffer *buffer,
				 Form_pg_attribute key_att)
{
	if (!can_coerce_type(1, &att->atttypid, &key_att->atttypid,
						 COERCION_ASSIGNMENT))
		ereport(ERROR,
				(errcode(ERRCODE_DATATYPE_MISMATCH),
				 errmsg("key column \"%s\" of buffer \"%s\" is of type %s but column \"%s\" of table \"%s\" is of type %s",
						NameStr(key_att->attname), NameStr(buffer->name),
						format_type_be(key_att->atttypid),
						NameStr(att->attname),
						RelationGetRelationName(rel),
						format_type_be(att->atttypid)),
				 errhint("There must be a cast between the types that assignments use.")));

	/* or what an insert has counted up, a delete would not count down */
	if (!key_assignment_is_immutable(key_att, att->atttypid,
									 att->atttypmod))
		ereport(ERROR,
				(errcode(ERRCODE_DATATYPE_MISMATCH),
				 errmsg("cannot count by column \"%s\" of table \"%s\" because its conversion from %s to %s is not immutable",
						NameStr(att->attname), RelationGetRelationName(rel),
						format_type_be(att->atttypid),
						format_type_be(key_att->atttypid)),
				 errdetail("In sessions with other settings, the same row would be counted under another key."),
				 errhint("Add a stored generated column of type %s to the table, with an expression that names the time zone or whatever else the conversion depends on, and count by that.",
						 format_type_be(key_att->atttypid))));
}

/* Find out where in the table the buffer's key is.  Fills in the cache. */
static void
find_key(FunctionCallInfo fcinfo, TriggerCache *cache,
		 TriggerErrorContext *context)
{
	TriggerData *trigdata = context->trigdata;
	Trigger    *trigger = trigdata->tg_trigger;
	Relation	rel = trigdata->tg_relation;
	SbBuffer   *buffer = cache->target.buffer;
	BufferShape *shape = buffer->shape;
	uint64		generation = buffer_generation;
	int			ncolumns = shape->desc->natts;
	AttrNumber *attnos;
	Oid		   *types;
	int32	   *typmods;
	MemoryContext oldcontext;

	cache->attnos = NULL;
	cache->target.last = NULL;
	if (trigger->tgnargs - 1 != ncolumns)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_OBJECT_DEFINITION),
				 errmsg("number of columns that trigger \"%s\" names does not match the key columns of buffer \"%s\"",
						trigger->tgname, NameStr(buffer->name)),
				 errdetail("Columns: %d. Key columns: %d.",
						   trigger->tgnargs - 1, ncolumns)));

	if (cache->key_context == NULL)
		cache->key_context = AllocSetContextCreate(fcinfo->flinfo->fn_mcxt,
												   "statbuffer trigger key",
												   ALLOCSET_SMALL_SIZES);
	else
		MemoryContextReset(cache->key_context);
	oldcontext = MemoryContextSwitchTo(cache->key_context);
	attnos = palloc(ncolumns * sizeof(AttrNumber));
	types = palloc(ncolumns * sizeof(Oid));
	typmods = palloc(ncolumns * sizeof(int32));
	for (int i = 0; i < ncolumns; i++)
	{
		Form_pg_attribute key_att = TupleDescAttr(shape->desc, i);
		Form_pg_attribute att;

		context->argno = i + 2;
		att = find_column(rel, trigger->tgargs[i + 1]);
		check_key_column(rel, att, buffer, key_att);
		attnos[i] = att->attnum;
		types[i] = att->atttypid;
		typmods[i] = att->atttypmod;
	}
	context->argno = 0;

	cache->reader = key_reader_make_columns(shape->desc,
											NameStr(buffer->name),
											types, typmods);
	cache->old.values = palloc(ncolumns * sizeof(Datum));
	cache->old.isnull = palloc(ncolumns * sizeof(bool));
	cache->new.values = palloc(ncolumns * sizeof(Datum));
	cache->new.isnull = palloc(ncolumns * sizeof(bool));
	MemoryContextSwitchTo(oldcontext);

	cache->runs_code = key_reader_runs_code(cache->reader);
	cache->is_text = shape->is_text && !cache->runs_code;
	cache->is_byval = ncolumns == 1 && !cache->runs_code &&
		TupleDescAttr(shape->desc, 0)->attbyval;
	cache->ncolumns = ncolumns;
	cache->shape = shape;
	cache->key_generation = generation;
	cache->attnos = attnos;
}

/* What the trigger's definition means, from the last call if it still holds. */
static TriggerCache *
get_cache(FunctionCallInfo fcinfo, TriggerErrorContext *context)
{
	TriggerCache *cache = fcinfo->flinfo->fn_extra;
	Trigger    *trigger = context->trigdata->tg_trigger;

	if (cache == NULL)
	{
		cache = MemoryContextAllocZero(fcinfo->flinfo->fn_mcxt,
									   sizeof(TriggerCache));
		fcinfo->flinfo->fn_extra = cache;
	}

	buffer_accept_changes();
	if (pending_is_open(&cache->target) && cache->attnos != NULL)
		return cache;

	if (trigger->tgnargs == 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_OBJECT_DEFINITION),
				 errmsg("trigger \"%s\" on table \"%s\" has no arguments",
						trigger->tgname,
						RelationGetRelationName(context->trigdata->tg_relation)),
				 errhint("The arguments of sb_trigger() are a buffer, and the columns of the table that are its key.")));
	context->argno = 1;
	pending_open(&cache->target, find_buffer(trigger->tgargs[0]), true);
	context->argno = 0;
	if (cache->attnos == NULL ||
		cache->key_generation != buffer_generation ||
		cache->shape != cache->target.buffer->shape)
		find_key(fcinfo, cache, context);
	return cache;
}

/* ------------------------------------------------------------------------
 * Counting
 * ------------------------------------------------------------------------
 */

static inline void
get_columns(TriggerCache *cache, TupleTableSlot *slot, RowKey *row)
{
	for (int i = 0; i < cache->ncolumns; i++)
		row->values[i] = slot_getattr(slot, cache->attnos[i], &row->isnull[i]);
}

/* Is the key in both rows the same, as far as it can be seen? */
static bool
same_columns(TriggerCache *cache, TupleDesc desc)
{
	for (int i = 0; i < cache->ncolumns; i++)
	{
		Form_pg_attribute att = TupleDescAttr(desc, cache->attnos[i] - 1);

		if (cache->old.isnull[i] != cache->new.isnull[i])
			return false;
		if (!cache->old.isnull[i] &&
			!datum_image_eq(cache->old.values[i], cache->new.values[i],
							att->attbyval, att->attlen))
			return false;
	}
	return true;
}

/* Make the stored form of a key.  Changes what is in `row'. */
static void
form_key(TriggerCache *cache, RowKey *row, KeySpace *space, KeyBytes *key)
{
	SbBuffer   *buffer = cache->target.buffer;
	BufferUse	use;

	if (cache->runs_code)
	{
		buffer_begin_use(buffer, &use);
		key_read_columns(cache->reader, row->values, row->isnull);
	}
	key_form(cache->shape->desc, NameStr(buffer->name), row->values,
			 row->isnull, space, key);
	if (cache->runs_code)
		buffer_end_use(&use);
}

/* After keys were formed: the code that ran may have done anything. */
static inline void
ensure_open(TriggerCache *cache)
{
	if (unlikely(cache->target.generation != buffer_generation))
		pending_open(&cache->target, cache->target.buffer->relid, true);
}

/* Count for a key that was formed. */
static PendingKey *
add_key(TriggerCache *cache, const KeyBytes *key, int64 count)
{
	return pending_add(cache->target.buffer, cache->shape, key, count,
					   cache->target.userid);
}

/* Is it the key of `last'? */
static inline bool
is_last(TriggerCache *cache, Datum value)
{
	if (cache->target.last == NULL)
		return false;
	return cache->is_byval ? cache->last_value == value :
		key_is_text(pending_key_data(cache->target.last), value);
}

/* Add to a row's key; often it is that of the row before. */
static void
count_key(TriggerCache *cache, RowKey *row, int64 count)
{
	KeySpace	space;
	KeyBytes	key;

	if ((cache->is_byval || cache->is_text) && !row->isnull[0])
	{
		Datum		value = row->values[0];

		if (is_last(cache, value))
		{
			pending_add_again(cache->target.last, count, cache->target.userid);
			return;
		}
		form_key(cache, row, &space, &key);
		cache->target.last = add_key(cache, &key, count);
		cache->last_value = value;
	}
	else
	{
		form_key(cache, row, &space, &key);
		ensure_open(cache);
		(void) add_key(cache, &key, count);
	}
}

/* A row's key may have changed: what one has less, the other has more. */
static void
count_change(TriggerCache *cache, TupleDesc desc)
{
	KeySpace	old_space;
	KeySpace	new_space;
	KeyBytes	old_key;
	KeyBytes	new_key;

	/* most updates leave the key alone */
	if (same_columns(cache, desc))
		return;
	form_key(cache, &cache->old, &old_space, &old_key);
	form_key(cache, &cache->new, &new_space, &new_key);
	if (old_key.len == new_key.len &&
		memcmp(old_key.data, new_key.data, KEY_LENGTH(old_key.len)) == 0)
		return;
	ensure_open(cache);
	(void) add_key(cache, &old_key, -1);
	(void) add_key(cache, &new_key, 1);
}

/* Count a row that went and a row that came; one of them may be NULL. */
static void
count_rows(TriggerCache *cache, TupleTableSlot *old, TupleTableSlot *new)
{
	if (old != NULL)
		get_columns(cache, old, &cache->old);
	if (new != NULL)
		get_columns(cache, new, &cache->new);
	if (old == NULL)
		count_key(cache, &cache->new, 1);
	else if (new == NULL)
		count_key(cache, &cache->old, -1);
	else
		count_change(cache, new->tts_tupleDescriptor);
}

/* ------------------------------------------------------------------------
 * Transition tables
 * ------------------------------------------------------------------------
 */

/* A pass through a transition table, beside those of other triggers. */
typedef struct TransitionScan
{
	Tuplestorestate *store;		/* NULL: at the end, or there is none */
	int			pointer;
	TupleTableSlot *slot;
} TransitionScan;

static void
begin_transition_scan(TransitionScan *scan, Tuplestorestate *store,
					  TupleDesc desc)
{
	scan->store = store;
	scan->pointer = 0;
	scan->slot = NULL;
	if (store == NULL)
		return;
	scan->pointer = tuplestore_alloc_read_pointer(store, EXEC_FLAG_REWIND);
	tuplestore_select_read_pointer(store, scan->pointer);
	tuplestore_rescan(store);
	scan->slot = MakeSingleTupleTableSlot(desc, &TTSOpsMinimalTuple);
}

/* The next row, or NULL. */
static TupleTableSlot *
next_transition_row(TransitionScan *scan)
{
	if (scan->store == NULL)
		return NULL;

	/* code that runs for a row may read the table, too */
	tuplestore_select_read_pointer(scan->store, scan->pointer);
	if (tuplestore_gettupleslot(scan->store, true, false, scan->slot))
		return scan->slot;
	scan->store = NULL;
	return NULL;
}

static void
end_transition_scan(TransitionScan *scan)
{
	if (scan->slot != NULL)
		ExecDropSingleTupleTableSlot(scan->slot);
}

/*
 * Count what a statement has done.
 *
 * An update's old and new rows are looked at in pairs, so that what leaves the
 * key as it is needs no memory.  Usually they are the same row's, and it does
 * not matter when they aren't: what counts is the sum.
 */
static void
count_statement(TriggerCache *cache, TriggerData *trigdata)
{
	TupleDesc	desc = RelationGetDescr(trigdata->tg_relation);
	MemoryContext row_context;
	TransitionScan old;
	TransitionScan new;

	begin_transition_scan(&old, trigdata->tg_oldtable, desc);
	begin_transition_scan(&new, trigdata->tg_newtable, desc);
	row_context = AllocSetContextCreate(CurrentMemoryContext,
										"statbuffer trigger row",
										ALLOCSET_DEFAULT_SIZES);
	for (;;)
	{
		TupleTableSlot *old_row = next_transition_row(&old);
		TupleTableSlot *new_row = next_transition_row(&new);
		MemoryContext oldcontext;

		if (old_row == NULL && new_row == NULL)
			break;
		CHECK_FOR_INTERRUPTS();
		MemoryContextReset(row_context);
		oldcontext = MemoryContextSwitchTo(row_context);
		count_rows(cache, old_row, new_row);
		MemoryContextSwitchTo(oldcontext);
	}
	MemoryContextDelete(row_context);
	end_transition_scan(&old);
	end_transition_scan(&new);
}

Datum
sb_trigger(PG_FUNCTION_ARGS)
{
	TriggerData *trigdata = (TriggerData *) fcinfo->context;
	TriggerErrorContext context;
	ErrorContextCallback callback;
	TriggerCache *cache;

	if (!CALLED_AS_TRIGGER(fcinfo))
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("function \"%s\" was not called by trigger manager",
						"sb_trigger")));

	context.trigdata = trigdata;
	context.argno = 0;
	callback.callback = add_error_context;
	callback.arg = &context;
	callback.previous = error_context_stack;
	error_context_stack = &callback;

	check_event(trigdata);
	cache = get_cache(fcinfo, &context);
	if (TRIGGER_FIRED_FOR_STATEMENT(trigdata->tg_event))
	{
		check_transition_tables(trigdata);
		count_statement(cache, trigdata);
	}
	else if (TRIGGER_FIRED_BY_INSERT(trigdata->tg_event))
		count_rows(cache, NULL, trigdata->tg_trigslot);
	else if (TRIGGER_FIRED_BY_DELETE(trigdata->tg_event))
		count_rows(cache, trigdata->tg_trigslot, NULL);
	else
		count_rows(cache, trigdata->tg_trigslot, trigdata->tg_newslot);

	error_context_stack = callback.previous;

	/* what an AFTER trigger returns is ignored */
	return PointerGetDatum(NULL);
}
