/*-------------------------------------------------------------------------
 *
 * trigger.c
 *	  sb_trigger(): keeps counts of a table's rows by the values of columns.
 *
 * The trigger's arguments are a buffer and the columns that are its key.  An
 * inserted row adds 1 to its key, a deleted row adds -1, and an update that
 * changes the key does both.  This works row by row, or for a whole statement
 * with its transition tables.
 *
 * The counts are part of the transaction, as with sb_increment(), and need the
 * same privileges: those of the user who changes the table.
 *
 * The trigger's definition is analyzed once per statement, and the result is
 * cached in fn_extra.  The executor has an fn_extra for each trigger of each
 * table.  It keeps it as long as the statement runs, and the table cannot be
 * altered meanwhile.
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

/*
 * The values of a key's columns: of the types that they have in the table or,
 * after key_read_columns(), in the buffer.
 */
typedef struct RowKey
{
	Datum	   *values;
	bool	   *isnull;
} RowKey;

typedef struct TriggerCache
{
	PendingTarget target;		/* `last' is only set if is_text or is_byval */

	/* the key's columns, for this shape, as looked up in this generation */
	uint64		key_generation;
	MemoryContext key_context;	/* for what follows; NULL the first time: it
								 * is beside the cache, and stays as long */
	bool		found_key;		/* there was a first time */
	const BufferShape *shape;
	int			ncolumns;
	AttrNumber *attnos;			/* NULL if not looked up yet */
	KeyReader  *reader;
	bool		runs_code;		/* key_reader_runs_code() */
	bool		is_text;		/* one column, of type text in both */
	bool		is_byval;		/* one column, passed by value */
	RowKey		old;
	RowKey		new;

	Datum		last_value;		/* the key of target.last, if is_byval */
} TriggerCache;

/* The subject of an error. */
typedef struct TriggerErrorContext
{
	TriggerData *trigdata;
	int			argno;			/* number of the argument, or 0 */
	bool		found;			/* there is a buffer with that name */
} TriggerErrorContext;

/*
 * The role that changes the table must not count in the buffer, as its owner may
 * not have expected: add to the error how to let it.
 */
static void
add_grant_hint(const char *buffer, bool found)
{
	const char *role = GetUserNameFromId(GetUserId(), true);

	/* it was dropped meanwhile */
	if (role == NULL)
		return;
	role = quote_identifier(role);
	if (found)
		errhint("The role that changes the table counts in the buffer: GRANT INSERT ON %s TO %s;",
				buffer, role);
	else
		errhint("The role that changes the table counts in the buffer: grant USAGE on the schema of %s to %s, and INSERT on the buffer.",
				buffer, role);
}

/* Error context callback: name the trigger and the table. */
static void
add_error_context(void *arg)
{
	TriggerErrorContext *context = arg;
	Trigger    *trigger = context->trigdata->tg_trigger;
	const char *relname = RelationGetRelationName(context->trigdata->tg_relation);

	if (context->argno == 1 && geterrcode() == ERRCODE_INSUFFICIENT_PRIVILEGE)
		add_grant_hint(trigger->tgargs[0], context->found);
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

/* Raise an error if we cannot count what this event does. */
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
				 errdetail("TRUNCATE does not look at the rows that it removes, so they cannot be counted down."),
				 errhint("Use DELETE, or disable the trigger for the TRUNCATE and then correct the counts, both stored and not yet stored.")));

	/* BEFORE triggers that run later may still change or prevent the event */
	if (!TRIGGER_FIRED_AFTER(event))
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("function \"%s\" must be fired AFTER", "sb_trigger"),
				 errhint("Create the trigger with AFTER instead of BEFORE or INSTEAD OF.")));
}

/*
 * Raise an error if a statement-level trigger lacks a transition table that it
 * needs.
 */
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

/*
 * Look up the relation that the first argument names, in SQL syntax.  Raises
 * an error if there is none.  Takes no lock.
 */
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
				 errhint("The first argument of sb_trigger() is the buffer. Specify its schema, too, so that it is found with any search path.")));
	return relid;
}

/*
 * Look up the column that an argument names literally, without SQL quoting.
 * Raises an error if there is none, or none that we can count by.
 */
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
				 errhint("The arguments of sb_trigger() after the first are columns of the table. Specify their exact names, case-sensitive and without quotes.")));
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
 * Raise an error if values of a column cannot be counted as values of a key
 * column.
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
				 errhint("There must be an assignment cast between the types.")));

	/* otherwise a delete might not subtract what the insert has added */
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

/*
 * Map the columns of the buffer's key to those of the table, and store the
 * result in the cache.  Raises an error if they do not match.
 */
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

	if (cache->key_context != NULL)
		MemoryContextReset(cache->key_context);
	else if (cache->found_key)
		cache->key_context = AllocSetContextCreate(fcinfo->flinfo->fn_mcxt,
												   "statbuffer trigger key",
												   ALLOCSET_SMALL_SIZES);
	cache->found_key = true;
	oldcontext = MemoryContextSwitchTo(cache->key_context ? cache->key_context :
									   fcinfo->flinfo->fn_mcxt);
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

/*
 * Get the analyzed definition of the trigger.  Reuses that of the last call if
 * it is still valid.
 */
static TriggerCache *
get_cache(FunctionCallInfo fcinfo, TriggerErrorContext *context)
{
	TriggerCache *cache = fcinfo->flinfo->fn_extra;
	Trigger    *trigger = context->trigdata->tg_trigger;
	Oid			relid;

	if (cache == NULL)
	{
		cache = MemoryContextAllocZero(fcinfo->flinfo->fn_mcxt,
									   sizeof(TriggerCache));
		fcinfo->flinfo->fn_extra = cache;
	}

	buffer_accept_changes();
	if (pending_is_open(&cache->target) && cache->attnos != NULL &&
		cache->key_generation == buffer_generation)
		return cache;

	if (trigger->tgnargs == 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_OBJECT_DEFINITION),
				 errmsg("trigger \"%s\" on table \"%s\" has no arguments",
						trigger->tgname,
						RelationGetRelationName(context->trigdata->tg_relation)),
				 errhint("The arguments of sb_trigger() are a buffer, and the columns of the table that are its key.")));
	context->argno = 1;
	relid = find_buffer(trigger->tgargs[0]);
	context->found = true;
	pending_open(&cache->target, relid, true);
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

/* Get the key's columns from a row. */
static inline void
get_columns(TriggerCache *cache, TupleTableSlot *slot, RowKey *row)
{
	for (int i = 0; i < cache->ncolumns; i++)
		row->values[i] = slot_getattr(slot, cache->attnos[i], &row->isnull[i]);
}

/*
 * Are the key's columns binary equal in both rows?  If not, the keys may still
 * be equal.
 */
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

/*
 * Form the stored form of a key.  Modifies `row'.  May run casts, which can do
 * anything.
 */
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

/*
 * Reopen the buffer if code that ran while keys were formed has invalidated
 * the target.
 */
static inline void
ensure_open(TriggerCache *cache)
{
	if (unlikely(cache->target.generation != buffer_generation))
		pending_open(&cache->target, cache->target.buffer->relid, true);
}

/* Add to a key that was formed, which is not to be compared by is_last(). */
static void
add_key(TriggerCache *cache, const KeyBytes *key, int64 count)
{
	(void) pending_add(&cache->target, cache->shape, key, count);
	cache->target.last = NULL;
}

/* Is the value the key that was counted last? */
static inline bool
is_last(TriggerCache *cache, Datum value)
{
	const char *text;
	Size		len;

	if (cache->target.last == NULL)
		return false;
	if (cache->is_byval)
		return cache->last_value == value;
	text = key_get_text(value, &len);

	return key_is_text(pending_key_data(cache->target.last), text, len);
}

/* Add to a row's key, which is often that of the previous row. */
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
			(void) pending_add_again(&cache->target, count);
			return;
		}
		form_key(cache, row, &space, &key);
		(void) pending_add(&cache->target, cache->shape, &key, count);
		cache->last_value = value;
	}
	else
	{
		form_key(cache, row, &space, &key);
		ensure_open(cache);
		add_key(cache, &key, count);
	}
}

/*
 * Count an update: if the key has changed, move 1 from the old key to the new
 * one.
 */
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
	add_key(cache, &old_key, -1);
	add_key(cache, &new_key, 1);
}

/*
 * Count the removal of a row and the addition of another; either may be NULL.
 */
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

/* A scan of a transition table, independent of those of other triggers. */
typedef struct TransitionScan
{
	Tuplestorestate *store;		/* NULL if there is none, or at the end */
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

/* Get the next row, or NULL. */
static TupleTableSlot *
next_transition_row(TransitionScan *scan)
{
	if (scan->store == NULL)
		return NULL;

	/* code that ran for the last row may have read the table, too */
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
 * Count all rows that a statement has changed.
 *
 * The old and new rows of an update are processed in pairs, so that updates
 * that leave the key unchanged need no memory.  Usually the two are versions
 * of the same row.  If they are not, that does not matter, because only the
 * sum counts.
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

/*
 * sb_trigger(): the trigger function.  Its contract is at the head of this
 * file.
 *
 * Requires the privileges and takes the locks of sb_increment().  Raises an
 * error if the trigger's definition does not match the table and the buffer,
 * for TRUNCATE, and if it is not called AFTER the event.
 */
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
	context.found = false;
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
