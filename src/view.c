/*-------------------------------------------------------------------------
 *
 * view.c
 *	  sb_view_trigger(): changes of a view that shows a target with its totals.
 *
 * sb_create_view() creates such a view: the columns of the target, with
 * sb_total() in place of the count column.  Rows that are inserted, updated or
 * deleted in it are those of the target, but what an UPDATE adds to the count
 * column is counted in the buffer.  So an UPDATE that only increments it locks
 * no row.
 *
 * The view's definition tells all that the trigger needs: which columns of
 * which table the view shows, and by the call of sb_total(), the buffer.  It
 * stays right when these are renamed.
 *
 * PostgreSQL reads the old row before it calls the trigger, and does not lock
 * it.  What follows for each column:
 *
 * - The count column has the total of that moment.  What is counted is the
 *	 difference to the new value.  Counts that are added by others meanwhile
 *	 stay.  When the target's row is deleted or gets another key, what is counted
 *	 for it by then goes with it: the total of that moment would not tell, for what
 *	 is stored may be another value now.
 * - Of the others, only those that the statement has changed are updated, and
 *	 only if they still have their old values: otherwise two sessions that
 *	 compute a new value from the same old one would both succeed.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/relation.h"
#include "buffer.h"
#include "catalog/pg_type.h"
#include "commands/trigger.h"
#include "compat.h"
#include "executor/spi.h"
#include "key.h"
#include "lib/stringinfo.h"
#include "nodes/nodeFuncs.h"
#include "nodes/parsenodes.h"
#include "parser/parsetree.h"
#include "pending.h"
#include "rewrite/rewriteHandler.h"
#include "target.h"
#include "total.h"
#include "utils/builtins.h"
#include "utils/datum.h"
#include "utils/fmgrprotos.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"

COMPAT_FUNCTION_INFO_V1(sb_view_trigger);

/* in ViewColumns.attnos: an expression */
#define NO_ATTNO			InvalidAttrNumber

/* What a view shows: the result of reading its definition. */
typedef struct ViewColumns
{
	Oid			relid;			/* the table */
	Oid			buffer;
	int			total;			/* number of the column with sb_total(), from
								 * 0 */
	List	   *keys;			/* the table's columns that it has as
								 * arguments */
	AttrNumber *attnos;			/* by column of the view: that of the table */
} ViewColumns;

/* A row of the view. */
typedef struct ViewRow
{
	Datum	   *values;
	bool	   *isnull;
} ViewRow;

/* A change of one row. */
typedef struct ViewChange
{
	Relation	view;
	TupleDesc	desc;			/* of the view */
	ViewColumns columns;
	SbBuffer   *buffer;
	Target	   *target;
	int		   *keys;			/* the view's columns, in the order of the key */
	ViewRow		old;
	ViewRow		new;
	MemoryContext context;		/* of the call */
} ViewChange;

/* A statement on the target, and its parameters. */
typedef struct ViewStatement
{
	StringInfoData text;
	Oid		   *types;
	Datum	   *values;
	char	   *nulls;
	int			nargs;
} ViewStatement;

/* ------------------------------------------------------------------------
 * The view's definition
 * ------------------------------------------------------------------------
 */

static void
report_unsuitable(Relation view, const char *reason)
{
	ereport(ERROR,
			(errcode(ERRCODE_WRONG_OBJECT_TYPE),
			 errmsg("view \"%s\" does not show a table with its totals",
					RelationGetRelationName(view)),
			 errdetail_internal("%s", reason),
			 errhint("Create the view with sb_create_view().")));
}

/* Take implicit casts from an expression: from name to text, for example. */
static Node *
strip_casts(Node *node)
{
	for (;;)
	{
		if (IsA(node, RelabelType))
			node = (Node *) ((RelabelType *) node)->arg;
		else if (IsA(node, FuncExpr) &&
				 ((FuncExpr *) node)->funcformat == COERCE_IMPLICIT_CAST)
			node = linitial(((FuncExpr *) node)->args);
		else
			return node;
	}
}

/* Get the number of the table's column that an expression is, or NO_ATTNO. */
static AttrNumber
get_column(Node *node, int varno)
{
	Var		   *var;

	node = strip_casts(node);
	var = (Var *) node;
	if (!IsA(node, Var) || var->varno != varno ||
		var->varlevelsup != 0 || var->varattno <= 0)
		return NO_ATTNO;
	return var->varattno;
}

/*
 * Get an argument of a function, from 0, which may be written with its name.
 * NULL: it is left out.
 */
static Node *
get_argument(const FuncExpr *call, int number)
{
	int			i = 0;
	ListCell   *lc;

	foreach(lc, call->args)
	{
		NamedArgExpr *named = lfirst(lc);

		if (!IsA(named, NamedArgExpr))
		{
			if (i++ == number)
				return lfirst(lc);
		}
		else if (named->argnumber == number)
			return (Node *) named->arg;
	}
	return NULL;
}

/*
 * Is it a call of sb_total(key, buffer), with a constant for the buffer?  Users
 * may have made functions of that name, too, but what is not of its type would be
 * taken for a number.
 */
static bool
is_total(Node *node, Oid schema)
{
	FuncExpr   *call = (FuncExpr *) node;
	Const	   *buffer;
	char	   *name;

	if (!IsA(node, FuncExpr) || list_length(call->args) != 2 ||
		call->funcresulttype != INT8OID ||
		get_func_namespace(call->funcid) != schema)
		return false;
	name = get_func_name(call->funcid);
	if (name == NULL || strcmp(name, "sb_total") != 0)
		return false;
	buffer = (Const *) get_argument(call, 1);
	return get_argument(call, 0) != NULL &&
		buffer != NULL && IsA(buffer, Const) &&
		buffer->consttype == REGCLASSOID && !buffer->constisnull &&
		OidIsValid(DatumGetObjectId(buffer->constvalue));
}

/* Read the key and the buffer that sb_total() is called with. */
static void
read_total(FuncExpr *call, int varno, ViewColumns *columns)
{
	Node	   *key = get_argument(call, 0);
	Const	   *buffer = (Const *) get_argument(call, 1);
	ListCell   *lc;

	columns->buffer = DatumGetObjectId(buffer->constvalue);
	columns->keys = NIL;
	if (!IsA(key, RowExpr))
		columns->keys = list_make1_int(get_column(key, varno));
	else
		foreach(lc, ((RowExpr *) key)->args)
			columns->keys = lappend_int(columns->keys,
										get_column(lfirst(lc), varno));
}

/* Does the query show rows of one table as they are? */
static bool
is_simple(const Query *query)
{
	return query->setOperations == NULL && query->groupClause == NIL &&
		query->groupingSets == NIL && query->distinctClause == NIL &&
		!query->hasAggs && !query->hasWindowFuncs &&
		!query->hasTargetSRFs && query->limitCount == NULL &&
		query->limitOffset == NULL &&
		list_length(query->jointree->fromlist) == 1 &&
		IsA(linitial(query->jointree->fromlist), RangeTblRef);
}

/*
 * Read what a view shows.  `schema' is that of sb_total().  Raises an error if
 * it is not one table, with one call of sb_total() among the columns.
 */
static void
read_view(Relation view, Oid schema, ViewColumns *columns)
{
	Query	   *query = get_view_query(view);
	RangeTblEntry *table = NULL;
	int			varno = 0;
	int			ntotals = 0;
	ListCell   *lc;

	if (is_simple(query))
	{
		varno = ((RangeTblRef *) linitial(query->jointree->fromlist))->rtindex;
		table = rt_fetch(varno, query->rtable);
	}
	if (table == NULL || table->rtekind != RTE_RELATION)
		report_unsuitable(view, "It does not show the rows of one table.");

	columns->relid = table->relid;
	columns->attnos = palloc0(RelationGetDescr(view)->natts * sizeof(AttrNumber));
	foreach(lc, query->targetList)
	{
		TargetEntry *entry = lfirst(lc);

		if (entry->resjunk)
			continue;
		if (is_total((Node *) entry->expr, schema))
		{
			ntotals++;
			columns->total = entry->resno - 1;
			read_total((FuncExpr *) entry->expr, varno, columns);
		}
		else if (IsA(entry->expr, Var))
			columns->attnos[entry->resno - 1] =
				get_column((Node *) entry->expr, varno);
	}
	if (ntotals != 1)
		report_unsuitable(view, "It does not have one column that calls sb_total() with a buffer.");
}

/*
 * Find the columns of the view that are the key.  Raises an error if the view
 * shows another table than the target, or lacks a key column.
 */
static void
find_keys(ViewChange *change)
{
	ViewColumns *columns = &change->columns;
	Target	   *target = change->target;

	if (target->relid != columns->relid)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("view \"%s\" does not show the target of buffer \"%s\"",
						RelationGetRelationName(change->view),
						NameStr(change->buffer->name)),
				 errdetail("It shows table \"%s\", and the target is %s.",
						   get_rel_name(columns->relid), target->name),
				 errhint("Create the view again with sb_create_view().")));

	change->keys = palloc(target->nkeys * sizeof(int));
	for (int i = 0; i < target->nkeys; i++)
	{
		AttrNumber	attno = target->keys[i].attno;
		int			column = 0;

		if (list_length(columns->keys) != target->nkeys ||
			list_nth_int(columns->keys, i) != attno)
			report_unsuitable(change->view, "It does not call sb_total() with the key columns of the buffer.");
		while (column < change->desc->natts &&
			   columns->attnos[column] != attno)
			column++;
		if (column == change->desc->natts)
			report_unsuitable(change->view, "It does not show all key columns of the buffer.");
		change->keys[i] = column;
	}
}

/*
 * Open the buffer for counting, and the target, as the view's definition tells.
 * Raises the errors of sb_increment() and sb_total().
 */
static void
open_change(FunctionCallInfo fcinfo, ViewChange *change)
{
	PendingTarget pending;
	SinkSource	source;

	read_view(change->view, get_func_namespace(fcinfo->flinfo->fn_oid),
			  &change->columns);
	pending_open(&pending, change->columns.buffer, true);
	change->buffer = pending.buffer;
	total_check_target(change->buffer);
	buffer_get_source(change->buffer, &source);
	change->target = target_open(&source, false, AccessShareLock);
	find_keys(change);
}

/* ------------------------------------------------------------------------
 * Counting
 * ------------------------------------------------------------------------
 */

/* Raises an error if the result is out of range. */
static int64
subtract(int64 a, int64 b)
{
	return DatumGetInt64(DirectFunctionCall2(int8mi, Int64GetDatum(a),
											 Int64GetDatum(b)));
}

/* Get the total of a row.  Raises an error if it is null. */
static int64
get_total(const ViewChange *change, const ViewRow *row)
{
	int			column = change->columns.total;

	if (row->isnull[column])
		ereport(ERROR,
				(errcode(ERRCODE_NOT_NULL_VIOLATION),
				 errmsg("null value in column \"%s\" of view \"%s\", which is a count",
						NameStr(TupleDescAttr(change->desc, column)->attname),
						RelationGetRelationName(change->view))));
	return DatumGetInt64(row->values[column]);
}

/* Get the key of a row. */
static void
get_key(const ViewChange *change, const ViewRow *row, ViewRow *key)
{
	int			nkeys = change->target->nkeys;

	key->values = palloc(nkeys * sizeof(Datum));
	key->isnull = palloc(nkeys * sizeof(bool));
	for (int i = 0; i < nkeys; i++)
	{
		key->values[i] = row->values[change->keys[i]];
		key->isnull[i] = row->isnull[change->keys[i]];
	}
}

/*
 * Open the buffer for counting, and form the key of a row.  Opens it anew, since
 * code that ran may have invalidated what was known of it.  Returns the shape
 * under which the key was formed.
 */
static const BufferShape *
open_key(ViewChange *change, const ViewRow *row, PendingTarget *pending,
		 KeySpace *space, KeyBytes *key)
{
	const BufferShape *shape = change->buffer->shape;
	ViewRow		values;

	pending_open(pending, change->columns.buffer, true);
	buffer_check_shape(pending->buffer, shape);
	get_key(change, row, &values);
	key_form(shape->desc, NameStr(pending->buffer->name), values.values,
			 values.isnull, space, key);
	return shape;
}

/* Add to a row's key in the buffer, as part of the transaction. */
static void
count(ViewChange *change, const ViewRow *row, int64 delta)
{
	const BufferShape *shape;
	PendingTarget pending;
	KeySpace	space;
	KeyBytes	key;

	if (delta == 0)
		return;
	shape = open_key(change, row, &pending, &space, &key);
	(void) pending_add(&pending, shape, &key, delta);
}

/*
 * Get what is counted for the old row and not stored in it.  The statement has
 * changed the row, so that no flush can change it.
 */
static int64
get_counted(ViewChange *change)
{
	const BufferShape *shape;
	PendingTarget pending;
	KeySpace	space;
	KeyBytes	key;

	shape = open_key(change, &change->old, &pending, &space, &key);
	return total_read_counted(pending.buffer, shape, &key);
}

/* ------------------------------------------------------------------------
 * Statements on the target
 * ------------------------------------------------------------------------
 */

static void
init_statement(ViewChange *change, ViewStatement *statement)
{
	/* each column may be in the key, and have a new value */
	int			nargs_max = 2 * change->desc->natts;

	initStringInfo(&statement->text);
	statement->types = palloc(nargs_max * sizeof(Oid));
	statement->values = palloc(nargs_max * sizeof(Datum));
	statement->nulls = palloc(nargs_max);
	statement->nargs = 0;
}

/* Add a column of a row as a parameter.  Returns the parameter's number. */
static int
add_parameter(ViewChange *change, ViewStatement *statement,
			  const ViewRow *row, int column)
{
	int			i = statement->nargs++;

	statement->types[i] = TupleDescAttr(change->desc, column)->atttypid;
	statement->values[i] = row->values[column];
	statement->nulls[i] = row->isnull[column] ? 'n' : ' ';
	return i + 1;
}

/*
 * Get the name of the table's column that a column of the view is: the count
 * column for the total.  NULL: it is another expression.
 */
static const char *
column_name(const ViewChange *change, int column)
{
	AttrNumber	attno = change->columns.attnos[column];

	if (column == change->columns.total)
		return change->target->count;
	if (attno == NO_ATTNO)
		return NULL;
	return quote_identifier(get_attname(change->target->relid, attno, false));
}

/*
 * Append the condition that a row of the target has the key of the old row.  Its
 * parameters must be the statement's first.
 */
static void
append_condition(ViewChange *change, ViewStatement *statement)
{
	ViewRow		key;

	Assert(statement->nargs == 0);
	get_key(change, &change->old, &key);
	for (int i = 0; i < change->target->nkeys; i++)
		(void) add_parameter(change, statement, &change->old, change->keys[i]);
	appendStringInfoString(&statement->text, " WHERE ");
	target_append_condition(&statement->text, change->target, "$", key.isnull);
}

/*
 * Append a list of what the view shows of a row of the target, except that the
 * total is what is stored.
 */
static void
append_columns(ViewChange *change, ViewStatement *statement)
{
	for (int i = 0; i < change->desc->natts; i++)
	{
		const char *name = column_name(change, i);

		appendStringInfoString(&statement->text, i > 0 ? ", " : " ");
		if (name == NULL)
			appendStringInfoString(&statement->text, "NULL");
		else if (i == change->columns.total)
			appendStringInfo(&statement->text,
							 "COALESCE(t.%s, 0)::pg_catalog.int8", name);
		else
			appendStringInfo(&statement->text, "t.%s", name);
	}
}

static void
append_returning(ViewChange *change, ViewStatement *statement)
{
	appendStringInfoString(&statement->text, " RETURNING");
	append_columns(change, statement);
}

/* Prepare and execute a statement.  The caller has connected to SPI. */
static void
execute(ViewChange *change, ViewStatement *statement)
{
	SPIPlanPtr	plan = SPI_prepare(statement->text.data, statement->nargs,
								   statement->types);
	int			code;

	if (plan == NULL)
		elog(ERROR, "could not prepare statement: %s",
			 SPI_result_code_string(SPI_result));
	target_check_plan(change->target, plan);
	code = SPI_execute_plan(plan, statement->values, statement->nulls, false, 0);
	if (code < 0)
		elog(ERROR, "could not execute statement: %s",
			 SPI_result_code_string(code));
}

/*
 * Run a statement that returns one row of the target, or none.  Returns false
 * if it is none.  The values are in the context of the call.
 *
 * It can run any code, so the buffer cannot be altered by this session
 * meanwhile.
 */
static bool
run_statement(ViewChange *change, ViewStatement *statement, ViewRow *result)
{
	int			natts = change->desc->natts;
	MemoryContext oldcontext;
	BufferUse	use;
	bool		found;

	result->values = palloc(natts * sizeof(Datum));
	result->isnull = palloc(natts * sizeof(bool));
	buffer_begin_use(change->buffer, &use);
	SPI_connect();
	execute(change, statement);
	found = SPI_processed > 0;
	if (SPI_processed > 1)
		target_report_duplicate();
	oldcontext = MemoryContextSwitchTo(change->context);
	for (int i = 0; found && i < natts; i++)
	{
		Form_pg_attribute att = TupleDescAttr(SPI_tuptable->tupdesc, i);
		Datum		value = SPI_getbinval(SPI_tuptable->vals[0],
										  SPI_tuptable->tupdesc, i + 1,
										  &result->isnull[i]);

		if (!result->isnull[i])
			result->values[i] = datumCopy(value, att->attbyval, att->attlen);
	}
	MemoryContextSwitchTo(oldcontext);
	SPI_finish();
	buffer_end_use(&use);
	return found;
}

/* ------------------------------------------------------------------------
 * The events
 * ------------------------------------------------------------------------
 */

/*
 * Form the row that the trigger returns: the new one, with what the target has
 * in its columns.  The total is that of the new one.
 */
static HeapTuple
form_result(const ViewChange *change, HeapTuple tuple, ViewRow *stored)
{
	bool	   *replace = palloc(change->desc->natts * sizeof(bool));

	for (int i = 0; i < change->desc->natts; i++)
		replace[i] = i != change->columns.total &&
			change->columns.attnos[i] != NO_ATTNO;
	return heap_modify_tuple(tuple, change->desc, stored->values,
							 stored->isnull, replace);
}

/*
 * Does the table compute a column's value, unless the statement gives one?  Such
 * a column has no default that the view could have.
 */
static bool
is_computed(const ViewChange *change, Relation table, int column)
{
	AttrNumber	attno = change->columns.attnos[column];
	Form_pg_attribute att;

	if (attno == NO_ATTNO)
		return false;
	att = TupleDescAttr(RelationGetDescr(table), attno - 1);
	return att->attidentity != '\0' || att->attgenerated != '\0';
}

/*
 * Insert a row in the target.  Returns NULL if a trigger of the target has
 * prevented it.
 */
static HeapTuple
insert(ViewChange *change, HeapTuple new)
{
	Relation	table = relation_open(change->target->relid, NoLock);
	const char *separator = "";
	ViewStatement statement;
	StringInfoData parameters;
	ViewRow		stored;

	init_statement(change, &statement);
	initStringInfo(&parameters);
	appendStringInfo(&statement.text, "INSERT INTO %s AS t (",
					 change->target->name);
	for (int i = 0; i < change->desc->natts; i++)
	{
		const char *name = column_name(change, i);

		if (name == NULL ||
			(change->new.isnull[i] && is_computed(change, table, i)))
			continue;
		appendStringInfo(&statement.text, "%s%s", separator, name);
		appendStringInfo(&parameters, "%s$%d", separator,
						 add_parameter(change, &statement, &change->new, i));
		separator = ", ";
	}
	appendStringInfo(&statement.text, ") VALUES (%s)", parameters.data);
	append_returning(change, &statement);
	relation_close(table, NoLock);
	if (!run_statement(change, &statement, &stored))
		return NULL;
	return form_result(change, new, &stored);
}

/* Is a column binary equal in two rows? */
static bool
is_same(TupleDesc desc, int column, const ViewRow *a, const ViewRow *b)
{
	Form_pg_attribute att = TupleDescAttr(desc, column);

	if (a->isnull[column] || b->isnull[column])
		return a->isnull[column] && b->isnull[column];
	return datum_image_eq(a->values[column], b->values[column],
						  att->attbyval, att->attlen);
}

/*
 * Which columns has the statement changed, other than the total?  Raises an
 * error if one is none of the table's.
 */
static Bitmapset *
find_changed(const ViewChange *change)
{
	Bitmapset  *changed = NULL;

	for (int i = 0; i < change->desc->natts; i++)
	{
		if (i == change->columns.total ||
			is_same(change->desc, i, &change->old, &change->new))
			continue;
		if (change->columns.attnos[i] == NO_ATTNO)
			ereport(ERROR,
					(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
					 errmsg("cannot update column \"%s\" of view \"%s\"",
							NameStr(TupleDescAttr(change->desc, i)->attname),
							RelationGetRelationName(change->view)),
					 errdetail("It is not a column of table %s.",
							   change->target->name)));
		changed = bms_add_member(changed, i);
	}
	return changed;
}

/* Get the row of the target, and lock it.  Returns false if it is gone. */
static bool
lock_row(ViewChange *change, ViewRow *stored)
{
	ViewStatement statement;

	init_statement(change, &statement);
	appendStringInfoString(&statement.text, "SELECT");
	append_columns(change, &statement);
	appendStringInfo(&statement.text, " FROM %s AS t", change->target->name);
	append_condition(change, &statement);
	appendStringInfoString(&statement.text, " FOR NO KEY UPDATE");
	return run_statement(change, &statement, stored);
}

/*
 * Raise an error if others have updated a column, which is to be updated now,
 * after the view was read.
 */
static void
check_unchanged(const ViewChange *change, const Bitmapset *changed,
				const ViewRow *stored)
{
	int			i = -1;

	while ((i = bms_next_member(changed, i)) >= 0)
		if (!is_same(change->desc, i, &change->old, stored))
			ereport(ERROR,
					(errcode(ERRCODE_T_R_SERIALIZATION_FAILURE),
					 errmsg("could not serialize access due to concurrent update"),
					 errdetail("Another transaction has updated column \"%s\" after view \"%s\" was read.",
							   NameStr(TupleDescAttr(change->desc, i)->attname),
							   RelationGetRelationName(change->view)),
					 errhint("Retry the transaction, or update columns that are not counted in table %s itself.",
							 change->target->name)));
}

/*
 * Update columns of the target, whose row is locked.  Returns false if a trigger
 * of the target has prevented it.
 */
static bool
update_row(ViewChange *change, const Bitmapset *changed, ViewRow *stored)
{
	const char *separator = " SET ";
	ViewStatement statement;
	StringInfoData assignments;
	int			i = -1;

	init_statement(change, &statement);
	append_condition(change, &statement);
	append_returning(change, &statement);
	initStringInfo(&assignments);
	while ((i = bms_next_member(changed, i)) >= 0)
	{
		appendStringInfo(&assignments, "%s%s = $%d", separator,
						 column_name(change, i),
						 add_parameter(change, &statement, &change->new, i));
		separator = ", ";
	}
	statement.text.data = psprintf("UPDATE %s AS t%s%s", change->target->name,
								   assignments.data, statement.text.data);
	return run_statement(change, &statement, stored);
}

/* Does the row that is stored have the key of the old one? */
static bool
keeps_key(const ViewChange *change, const ViewRow *stored)
{
	for (int i = 0; i < change->target->nkeys; i++)
		if (!is_same(change->desc, change->keys[i], &change->old, stored))
			return false;
	return true;
}

/*
 * Update a row: count what was added to the total, and update what else has
 * changed in the target.  If the row has another key then, which a trigger of the
 * target may have given it, what is counted moves to that one.  Returns NULL if
 * the row is gone, or if a trigger has prevented it.
 */
static HeapTuple
update(ViewChange *change, HeapTuple new)
{
	int64		difference = subtract(get_total(change, &change->new),
									  get_total(change, &change->old));
	Bitmapset  *changed = find_changed(change);
	int64		moved;
	ViewRow		stored;

	if (bms_is_empty(changed))
	{
		count(change, &change->old, difference);
		return new;
	}

	if (!lock_row(change, &stored))
		return NULL;
	check_unchanged(change, changed, &stored);
	if (!update_row(change, changed, &stored))
		return NULL;
	if (keeps_key(change, &stored))
		count(change, &change->old, difference);
	else
	{
		moved = get_counted(change);
		count(change, &change->old, subtract(0, moved));
		count(change, &stored, subtract(moved, subtract(0, difference)));
	}
	return form_result(change, new, &stored);
}

/*
 * Delete a row, and what was counted for it.  Returns false if it is gone, or if
 * a trigger of the target has prevented it.
 */
static bool
delete(ViewChange *change)
{
	ViewStatement statement;
	ViewRow		stored;

	init_statement(change, &statement);
	appendStringInfo(&statement.text, "DELETE FROM %s AS t",
					 change->target->name);
	append_condition(change, &statement);
	append_returning(change, &statement);
	if (!run_statement(change, &statement, &stored))
		return false;
	count(change, &change->old, subtract(0, get_counted(change)));
	return true;
}

/* Get the values of a tuple of the view. */
static void
read_row(const ViewChange *change, HeapTuple tuple, ViewRow *row)
{
	row->values = palloc(change->desc->natts * sizeof(Datum));
	row->isnull = palloc(change->desc->natts * sizeof(bool));
	heap_deform_tuple(tuple, change->desc, row->values, row->isnull);
}

/* Raise an error if the trigger is not one that we can be. */
static void
check_trigger(FunctionCallInfo fcinfo)
{
	TriggerData *trigdata = (TriggerData *) fcinfo->context;

	if (!CALLED_AS_TRIGGER(fcinfo))
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("function \"%s\" was not called by trigger manager",
						"sb_view_trigger")));
	if (!TRIGGER_FIRED_INSTEAD(trigdata->tg_event))
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("function \"%s\" must be fired INSTEAD OF",
						"sb_view_trigger"),
				 errhint("Create the view with sb_create_view().")));
}

/*
 * sb_view_trigger(): the trigger function.  Its contract is at the head of this
 * file.
 *
 * Requires the INSERT privilege on the buffer, and that on the target for what
 * the statement changes there.  Takes RowExclusiveLock on the buffer, and on the
 * target if it changes something there, to the end of the transaction.  Raises an
 * error if the view is not one that sb_create_view() could have made, if the
 * buffer is stopped, and if a column that is updated was updated by others
 * meanwhile.
 */
Datum
sb_view_trigger(PG_FUNCTION_ARGS)
{
	TriggerData *trigdata = (TriggerData *) fcinfo->context;
	ViewChange	change = {0};
	HeapTuple	result;

	check_trigger(fcinfo);
	change.view = trigdata->tg_relation;
	change.desc = RelationGetDescr(change.view);
	change.context = CurrentMemoryContext;
	open_change(fcinfo, &change);

	/* the only row of an INSERT is the new one */
	if (TRIGGER_FIRED_BY_INSERT(trigdata->tg_event))
	{
		read_row(&change, trigdata->tg_trigtuple, &change.new);
		result = insert(&change, trigdata->tg_trigtuple);
	}
	else
	{
		read_row(&change, trigdata->tg_trigtuple, &change.old);
		if (TRIGGER_FIRED_BY_UPDATE(trigdata->tg_event))
		{
			read_row(&change, trigdata->tg_newtuple, &change.new);
			result = update(&change, trigdata->tg_newtuple);
		}
		else
			result = delete(&change) ? trigdata->tg_trigtuple : NULL;
	}
	return PointerGetDatum(result);
}
