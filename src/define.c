/*-------------------------------------------------------------------------
 *
 * define.c
 *	  What statements that define a buffer check: the validator of options;
 *	  whether what an ALTER leaves is still a buffer, which is an error if not;
 *	  whether what it holds fits altered key columns, which is a warning if not;
 *	  and whether the counts could be stored, which is a notice if not.
 *
 * The last is checked as sb_start() does.  It is no error, because the handler or
 * the target may be created after the buffer.
 *
 * ddl.c tells which relations a statement touches, and they are looked at when
 * the statement is done.  For that, the session must have loaded the library
 * before.  The validator is called by the statement that loads it, too, so there
 * it looks for the table itself.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/relation.h"
#include "access/reloptions.h"
#include "access/xact.h"
#include "buffer.h"
#include "catalog/namespace.h"
#include "catalog/objectaccess.h"
#include "catalog/pg_class.h"
#include "catalog/pg_foreign_table.h"
#include "compat.h"
#include "convert.h"
#include "ddl.h"
#include "define.h"
#include "durable.h"
#include "foreign/foreign.h"
#include "miscadmin.h"
#include "owner.h"
#include "sink.h"
#include "tcop/pquery.h"
#include "utils/guc.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/resowner.h"

COMPAT_FUNCTION_INFO_V1(statbuffer_fdw_validator);

/* A relation that a statement has created or altered, as it was before. */
typedef struct TouchedTable
{
	Oid			relid;
	AttrNumber	count_attno;	/* 0: it was not there, or no buffer */
	NameData	count_name;
	int			natts;
	bool		columns;		/* a column was touched */
} TouchedTable;

/* the innermost statement that is watched, or NULL */
static DefineWatch *current = NULL;

/* the function that runs the statement checks the buffer itself */
static bool is_quiet = false;

/* ------------------------------------------------------------------------
 * Could the counts be stored?
 * ------------------------------------------------------------------------
 */

/* Raise the error that sb_start() would raise for a buffer with these options. */
static void
check_sink(Relation rel, const BufferOptions *options)
{
	SinkSource	source;
	OwnerView	saved;

	buffer_describe(rel, options, &source);
	owner_enter(source.owner, &saved);
	sink_for(options)->check(&source);
	owner_leave(&saved);
}

/*
 * Run check_sink() in a subtransaction.  Returns the error that it has raised, or
 * NULL.
 */
static ErrorData *
try_sink(Relation rel, const BufferOptions *options)
{
	MemoryContext context = CurrentMemoryContext;
	ResourceOwner owner = CurrentResourceOwner;
	ErrorData  *volatile edata = NULL;

	BeginInternalSubTransaction(NULL);
	MemoryContextSwitchTo(context);
	PG_TRY();
	{
		check_sink(rel, options);
		ReleaseCurrentSubTransaction();
	}
	PG_CATCH();
	{
		MemoryContextSwitchTo(context);
		edata = CopyErrorData();
		FlushErrorState();
		RollbackAndReleaseCurrentSubTransaction();
	}
	PG_END_TRY();
	MemoryContextSwitchTo(context);
	CurrentResourceOwner = owner;
	return edata;
}

/* Send a notice if the counts of a buffer with these options cannot be stored. */
static void
advise(Relation rel, const BufferOptions *options)
{
	ErrorData  *edata;

	/* by this setting, a dump says that what is referred to may come later */
	if (is_quiet || !check_function_bodies || IsBinaryUpgrade)
		return;
	edata = try_sink(rel, options);
	if (edata == NULL)
		return;
	if (ERRCODE_TO_CATEGORY(edata->sqlerrcode) == ERRCODE_OPERATOR_INTERVENTION)
		ReThrowError(edata);
	ereport(NOTICE,
			(errcode(edata->sqlerrcode),
			 errmsg_internal("%s", edata->message),
			 edata->detail ? errdetail_internal("%s", edata->detail) : 0,
			 edata->hint ? errhint("%s", edata->hint) : 0));
	FreeErrorData(edata);
}

/*
 * Send no such notices, or send them again.  Returns what was set before, which
 * the caller must set again, also after an error.
 */
bool
define_set_quiet(bool quiet)
{
	bool		was_quiet = is_quiet;

	is_quiet = quiet;
	return was_quiet;
}

/* ------------------------------------------------------------------------
 * Statements
 * ------------------------------------------------------------------------
 */

/*
 * Can the statement define, alter or damage a buffer?  Dropping a type drops
 * columns, too.
 */
bool
define_may_alter(const Node *statement)
{
	switch (nodeTag(statement))
	{
		case T_CreateForeignTableStmt:
		case T_AlterTableStmt:
		case T_RenameStmt:
		case T_DropStmt:
		case T_DropOwnedStmt:
			return true;
		default:
			return false;
	}
}

/*
 * The statement has created a relation, or is about to change one: a DdlWatcher.
 * Changes cannot be seen yet.
 */
static void
touch(ObjectAccessType access, Oid relid, int attno)
{
	MemoryContext oldcontext;
	TouchedTable *table;
	ListCell   *lc;
	bool		is_new = access == OAT_POST_CREATE && attno == 0;

	if (access == OAT_DROP && attno == 0)
		return;
	if (!is_new && get_rel_relkind(relid) != RELKIND_FOREIGN_TABLE)
		return;
	foreach(lc, current->tables)
	{
		table = lfirst(lc);
		if (table->relid != relid)
			continue;
		table->columns |= attno > 0;
		return;
	}

	oldcontext = MemoryContextSwitchTo(current->context);
	table = palloc0(sizeof(TouchedTable));
	table->relid = relid;
	table->columns = attno > 0;
	if (!is_new)
	{
		Relation	rel = relation_open(relid, NoLock);
		const char *problem;

		table->natts = RelationGetNumberOfAttributes(rel);
		if (buffer_is_relation(rel))
			table->count_attno = buffer_find_count(rel, &problem);
		if (table->count_attno != 0)
			table->count_name = TupleDescAttr(RelationGetDescr(rel),
											  table->count_attno - 1)->attname;
		relation_close(rel, NoLock);
	}
	current->tables = lappend(current->tables, table);
	MemoryContextSwitchTo(oldcontext);
}

/* Watch the statement that is about to run.  Call define_end() in any case. */
void
define_begin(DefineWatch *watch)
{
	watch->outer = current;
	watch->context = CurrentMemoryContext;
	watch->tables = NIL;
	current = watch;
	ddl_set_watcher(touch);
}

/* The statement has ended: cannot fail. */
void
define_end(const DefineWatch *watch)
{
	current = watch->outer;
	if (current == NULL)
		ddl_set_watcher(NULL);
}

/*
 * Raise an error if a relation that was a buffer is none any more, or if another
 * column is its count.  It may be a new one, if the former one was dropped.
 */
static void
check_shape(Relation rel, const TouchedTable *table)
{
	TupleDesc	desc = RelationGetDescr(rel);
	const char *problem;
	AttrNumber	count_attno = buffer_find_count(rel, &problem);

	if (table->count_attno == 0 || count_attno == table->count_attno)
		return;
	if (count_attno > table->natts &&
		TupleDescAttr(desc, table->count_attno - 1)->attisdropped)
		return;
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_TABLE_DEFINITION),
			 errmsg("cannot alter buffer \"%s\" in this way",
					RelationGetRelationName(rel)),
			 count_attno == 0 ? errdetail("%s", problem) :
			 errdetail("Column \"%s\" would take the place of the count column \"%s\".",
					   NameStr(TupleDescAttr(desc, count_attno - 1)->attname),
					   NameStr(table->count_name)),
			 errhint("To add a key column, drop the count column and add it again after the new one, in the same statement.")));
}

/*
 * Key columns of a buffer were altered: convert what it holds, and warn of what
 * cannot be converted.  The statement has locked it in AccessExclusiveLock, so
 * nothing is counted meanwhile.  Does not wait for saved counts to be loaded: the
 * worker converts these.
 */
static void
convert_held(Oid relid)
{
	SbBuffer   *buffer = buffer_open(relid, NoLock);
	ConvertResult result;
	uint64		nkeys;
	int64		sum;

	convert_altered(buffer, &result);
	if (buffer->shared == NULL)
		return;
	table_sum(&buffer->table, ~buffer->table.readable, &nkeys, &sum);
	if (nkeys > 0)
		ereport(WARNING,
				(errmsg("buffer \"%s\" holds counts that do not fit its altered key columns",
						NameStr(buffer->name)),
				 result.message == NULL ?
				 errdetail_plural("A count of " INT64_FORMAT " in %llu key is kept, and not stored.",
								  "Counts of " INT64_FORMAT " altogether in %llu keys are kept, and not stored.",
								  (unsigned long) nkeys,
								  sum, (unsigned long long) nkeys) :
				 errdetail_plural("A count of " INT64_FORMAT " in %llu key is kept, and not stored: %s",
								  "Counts of " INT64_FORMAT " altogether in %llu keys are kept, and not stored. The first of them: %s",
								  (unsigned long) nkeys,
								  sum, (unsigned long long) nkeys, result.message),
				 errhint("Alter the columns back to have them stored, or discard them with TRUNCATE. sb_keys() shows them.")));
}

/*
 * The statement is done: look at what it has touched.  Raises an error if a
 * buffer has lost its shape.
 */
void
define_check(const DefineWatch *watch)
{
	ListCell   *lc;

	if (watch->tables == NIL)
		return;
	CommandCounterIncrement();
	foreach(lc, watch->tables)
	{
		TouchedTable *table = lfirst(lc);
		Relation	rel = try_relation_open(table->relid, NoLock);
		BufferOptions options;
		const char *problem;

		if (rel == NULL)
			continue;
		if (buffer_is_relation(rel))
		{
			check_shape(rel, table);
			if (table->columns && buffer_find_count(rel, &problem) != 0)
				convert_held(table->relid);
			options_parse(GetForeignTable(table->relid)->options, &options);
			advise(rel, &options);
		}
		relation_close(rel, NoLock);
	}
}

/* ------------------------------------------------------------------------
 * The validator
 * ------------------------------------------------------------------------
 */

/*
 * Find the foreign table that the client's statement defines or alters.  Returns
 * NULL if it does neither, or not directly.
 */
static Relation
open_defined_table(void)
{
	PlannedStmt *planned;
	RangeVar   *name = NULL;
	LOCKTAG		tag;
	Oid			relid;
	Relation	rel;

	if (ActivePortal == NULL || list_length(ActivePortal->stmts) != 1)
		return NULL;
	planned = linitial_node(PlannedStmt, ActivePortal->stmts);
	if (planned->utilityStmt == NULL)
		return NULL;
	if (IsA(planned->utilityStmt, CreateForeignTableStmt))
		name = ((CreateForeignTableStmt *) planned->utilityStmt)->base.relation;
	else if (IsA(planned->utilityStmt, AlterTableStmt))
		name = ((AlterTableStmt *) planned->utilityStmt)->relation;
	if (name == NULL)
		return NULL;
	relid = RangeVarGetRelid(name, NoLock, true);
	if (!OidIsValid(relid))
		return NULL;
	buffer_set_relation_tag(&tag, relid);
	if (!compat_lock_held_or_stronger(&tag, AccessShareLock))
		return NULL;
	rel = try_relation_open(relid, NoLock);
	if (rel != NULL && rel->rd_rel->relkind != RELKIND_FOREIGN_TABLE)
	{
		relation_close(rel, NoLock);
		rel = NULL;
	}
	return rel;
}

/*
 * statbuffer_fdw_validator(options text[], catalog oid): the validator
 * function of the foreign-data wrapper.  Raises an error for the first invalid
 * option.  Only foreign tables have any.
 */
Datum
statbuffer_fdw_validator(PG_FUNCTION_ARGS)
{
	List	   *options = untransformRelOptions(PG_GETARG_DATUM(0));
	Oid			catalog = PG_GETARG_OID(1);
	BufferOptions parsed;

	if (catalog == ForeignTableRelationId)
	{
		options_parse(options, &parsed);
		durable_note_options();

		/* the statement that loads the library is not watched */
		if (current == NULL)
		{
			Relation	rel = open_defined_table();

			if (rel != NULL)
			{
				advise(rel, &parsed);
				relation_close(rel, NoLock);
			}
		}
	}
	else if (options != NIL)
		ereport(ERROR,
				(errcode(ERRCODE_FDW_INVALID_OPTION_NAME),
				 errmsg("invalid option \"%s\"",
						linitial_node(DefElem, options)->defname),
				 errhint("There are no valid options in this context. The options of a buffer are those of its foreign table.")));
	PG_RETURN_VOID();
}
