/*-------------------------------------------------------------------------
 *
 * create.c
 *	  Creating buffers: the default buffer, and one for a table's column; and
 *	  the view of a table with the totals of a buffer.
 *
 * What is made here can also be written by hand, as CREATE FOREIGN TABLE and
 * CREATE VIEW.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/relation.h"
#include "access/table.h"
#include "buffer.h"
#include "catalog/dependency.h"
#include "catalog/indexing.h"
#include "catalog/namespace.h"
#include "catalog/pg_depend.h"
#include "catalog/pg_extension.h"
#include "catalog/pg_foreign_server.h"
#include "catalog/pg_proc.h"
#include "catalog/pg_type.h"
#include "compat.h"
#include "create.h"
#include "define.h"
#include "executor/spi.h"
#include "foreign/foreign.h"
#include "functions.h"
#include "lib/stringinfo.h"
#include "nodes/makefuncs.h"
#include "sink.h"
#include "sink_function.h"
#include "target.h"
#include "total.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/syscache.h"

COMPAT_FUNCTION_INFO_V1(sb_create);
COMPAT_FUNCTION_INFO_V1(sb_create_view);

/*
 * Run a utility statement as the current user.  We check ourselves what it would
 * send notices of.
 */
static void
execute(const char *statement)
{
	bool		was_quiet = define_set_quiet(true);

	PG_TRY();
	{
		SPI_connect();
		if (SPI_execute(statement, false, 0) != SPI_OK_UTILITY)
			elog(ERROR, "could not execute \"%s\"", statement);
		SPI_finish();
	}
	PG_FINALLY();
	{
		(void) define_set_quiet(was_quiet);
	}
	PG_END_TRY();
}

/*
 * Get the name of the foreign server that belongs to the extension, which may
 * have been renamed.  Users may have created others.
 */
static char *
extension_server(Oid funcid)
{
	Oid			extension = getExtensionOfObject(ProcedureRelationId, funcid);
	Relation	catalog = table_open(DependRelationId, AccessShareLock);
	ScanKeyData keys[2];
	SysScanDesc scan;
	HeapTuple	tuple;
	Oid			server = InvalidOid;

	ScanKeyInit(&keys[0], Anum_pg_depend_refclassid, BTEqualStrategyNumber,
				F_OIDEQ, ObjectIdGetDatum(ExtensionRelationId));
	ScanKeyInit(&keys[1], Anum_pg_depend_refobjid, BTEqualStrategyNumber,
				F_OIDEQ, ObjectIdGetDatum(extension));
	scan = systable_beginscan(catalog, DependReferenceIndexId, true, NULL,
							  lengthof(keys), keys);
	while (HeapTupleIsValid(tuple = systable_getnext(scan)))
	{
		Form_pg_depend depend = (Form_pg_depend) GETSTRUCT(tuple);

		if (depend->classid == ForeignServerRelationId &&
			depend->deptype == DEPENDENCY_EXTENSION)
			server = depend->objid;
	}
	systable_endscan(scan);
	table_close(catalog, AccessShareLock);
	if (!OidIsValid(server))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("extension \"%s\" has no foreign server", "statbuffer")));
	return GetForeignServer(server)->servername;
}

/*
 * Create the default buffer.  Its handler is the function handle_flush() on
 * the caller's search path.
 */
Oid
create_default_buffer(FunctionCallInfo fcinfo)
{
	char	   *schema = get_namespace_name(get_func_namespace(fcinfo->flinfo->fn_oid));
	TupleDesc	desc = CreateTemplateTupleDesc(1);
	Oid			funcid;
	bool		takes_arrays;
	char	   *handler;

	TupleDescInitEntry(desc, 1, "key", TEXTOID, -1, 0);
	TupleDescFinalize(desc);
	funcid = handler_find("handle_flush", desc, &takes_arrays);
	handler = quote_qualified_identifier(get_namespace_name(get_func_namespace(funcid)),
										 get_func_name(funcid));
	execute(psprintf("CREATE FOREIGN TABLE %s"
					 " (key pg_catalog.text NOT NULL,"
					 " count pg_catalog.int8 NOT NULL DEFAULT 1)"
					 " SERVER %s OPTIONS (handler %s)",
					 quote_qualified_identifier(schema, DEFAULT_BUFFER),
					 quote_identifier(extension_server(fcinfo->flinfo->fn_oid)),
					 quote_literal_cstr(handler)));
	return function_default_buffer(fcinfo);
}

/* Raise an error if an argument is null. */
static void
check_not_null(FunctionCallInfo fcinfo, int argno, const char *name)
{
	if (PG_ARGISNULL(argno))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("%s must not be null", name)));
}

/*
 * Read the name of a relation that is to be created.  Returns it with the schema
 * in which it will be, quoted: later statements must not mean another one by it.
 */
static char *
read_new_name(text *name)
{
	RangeVar   *range = makeRangeVarFromNameList(textToQualifiedNameList(name));
	Oid			schema = RangeVarGetCreationNamespace(range);

	return quote_qualified_identifier(get_namespace_name(schema),
									  range->relname);
}

/* Get the OID of a relation that was created with that name. */
static Oid
get_new_relation(const char *name)
{
	return RangeVarGetRelid(makeRangeVarFromNameList(compat_qualified_name_list(name)),
							NoLock, false);
}

/* Append the definitions of the key columns: those of the target. */
static void
append_key_columns(StringInfo statement, Relation rel, const List *attnos)
{
	ListCell   *lc;

	foreach(lc, attnos)
	{
		Form_pg_attribute att = TupleDescAttr(RelationGetDescr(rel),
											  lfirst_int(lc) - 1);

		appendStringInfo(statement, "%s %s",
						 quote_identifier(NameStr(att->attname)),
						 format_type_extended(att->atttypid, att->atttypmod,
											  FORMAT_TYPE_TYPEMOD_GIVEN |
											  FORMAT_TYPE_FORCE_QUALIFY));
		if (OidIsValid(att->attcollation))
			appendStringInfoString(statement,
								   target_collation(att->attcollation));
		appendStringInfoString(statement, " NOT NULL, ");
	}
}

/* Append the options that sb_create() was given, each as name=value. */
static void
append_options(StringInfo statement, ArrayType *array)
{
	Datum	   *elements;
	bool	   *isnull;
	int			n;

	deconstruct_array(array, TEXTOID, -1, false, TYPALIGN_INT, &elements,
					  &isnull, &n);
	for (int i = 0; i < n; i++)
	{
		char	   *option = isnull[i] ? NULL : TextDatumGetCString(elements[i]);
		char	   *value = option == NULL ? NULL : strchr(option, '=');

		if (value == NULL)
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					 option == NULL ? errmsg("option must not be null") :
					 errmsg("option \"%s\" has no value", option),
					 errhint("Specify an option as 'name=value', for example 'interval=1s'.")));
		*value++ = '\0';
		appendStringInfo(statement, ", %s %s", quote_identifier(option),
						 quote_literal_cstr(value));
	}
}

/*
 * sb_create(buffer text, target regclass, column name, VARIADIC options text[]):
 * create a buffer whose counts go to a column of a table.  Its key columns are
 * those of the table's primary key or, if it has none, of its only unique
 * constraint.
 *
 * Does what CREATE FOREIGN TABLE does, with its privileges and errors, and checks
 * the target as sb_start() does, as the caller.  Takes AccessShareLock on the
 * table, to the end of the transaction.
 */
Datum
sb_create(PG_FUNCTION_ARGS)
{
	char	   *name;
	Relation	rel;
	StringInfoData statement;
	Oid			relid;
	SbBuffer   *buffer;
	SinkSource	source;

	check_not_null(fcinfo, 0, "buffer");
	check_not_null(fcinfo, 1, "target");
	check_not_null(fcinfo, 2, "column");
	check_not_null(fcinfo, 3, "options");
	name = read_new_name(PG_GETARG_TEXT_PP(0));
	rel = try_relation_open(PG_GETARG_OID(1), AccessShareLock);
	if (rel == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_TABLE),
				 errmsg("relation with OID %u does not exist",
						PG_GETARG_OID(1))));

	initStringInfo(&statement);
	appendStringInfo(&statement, "CREATE FOREIGN TABLE %s (", name);
	append_key_columns(&statement, rel, target_find_key(rel));
	appendStringInfo(&statement,
					 "%s pg_catalog.int8 NOT NULL DEFAULT 1)"
					 " SERVER %s OPTIONS (target %s",
					 quote_identifier(NameStr(*PG_GETARG_NAME(2))),
					 quote_identifier(extension_server(fcinfo->flinfo->fn_oid)),
					 quote_literal_cstr(target_name(RelationGetRelid(rel))));
	append_options(&statement, PG_GETARG_ARRAYTYPE_P(3));
	appendStringInfoChar(&statement, ')');
	relation_close(rel, NoLock);
	execute(statement.data);

	relid = get_new_relation(name);
	buffer = buffer_open(relid, AccessShareLock);
	buffer_get_source(buffer, &source);
	sink_for(source.options)->check(&source);
	PG_RETURN_OID(relid);
}

/*
 * Append the columns of a view: those of the target, with the total in place of
 * the count column.
 */
static void
append_view_columns(StringInfo statement, Relation rel, const Target *target,
					Oid buffer, const char *schema)
{
	TupleDesc	desc = RelationGetDescr(rel);
	const char *separator = "";

	for (int i = 0; i < desc->natts; i++)
	{
		Form_pg_attribute att = TupleDescAttr(desc, i);

		if (att->attisdropped)
			continue;
		appendStringInfoString(statement, separator);
		separator = ", ";
		if (att->attnum == target->count_attno)
		{
			appendStringInfo(statement, "%s.sb_total(%s", schema,
							 target->nkeys > 1 ? "ROW(" : "");
			for (int key = 0; key < target->nkeys; key++)
				appendStringInfo(statement, "%st.%s", key > 0 ? ", " : "",
								 target->keys[key].name);
			appendStringInfo(statement, "%s, %s::pg_catalog.regclass) AS %s",
							 target->nkeys > 1 ? ")" : "",
							 quote_literal_cstr(target_name(buffer)),
							 target->count);
		}
		else
			appendStringInfo(statement, "t.%s",
							 quote_identifier(NameStr(att->attname)));
	}
}

/* Give the columns of a view the defaults that the target's columns have. */
static void
copy_defaults(const char *view, Relation rel)
{
	TupleDesc	desc = RelationGetDescr(rel);

	for (int i = 0; desc->constr != NULL && i < desc->constr->num_defval; i++)
	{
		AttrDefault *value = &desc->constr->defval[i];
		Form_pg_attribute att = TupleDescAttr(desc, value->adnum - 1);
		Datum		expression;

		if (att->attgenerated)
			continue;
		expression = DirectFunctionCall2(pg_get_expr,
										 CStringGetTextDatum(value->adbin),
										 ObjectIdGetDatum(RelationGetRelid(rel)));
		execute(psprintf("ALTER VIEW %s ALTER COLUMN %s SET DEFAULT %s", view,
						 quote_identifier(NameStr(att->attname)),
						 TextDatumGetCString(expression)));
	}
}

/*
 * sb_create_view(view text, buffer regclass): create an updatable view of a
 * buffer's target that has the totals in place of the count column.
 *
 * Does what CREATE VIEW and CREATE TRIGGER do, with their privileges and errors;
 * whoever uses the view needs the privileges on the table and on the buffer
 * himself.  Requires the SELECT privilege on the buffer.  Takes AccessShareLock on
 * it and on the target, to the end of the transaction.
 */
Datum
sb_create_view(PG_FUNCTION_ARGS)
{
	const char *schema = quote_identifier(get_namespace_name(get_func_namespace(fcinfo->flinfo->fn_oid)));
	char	   *name;
	Oid			relid;
	SbBuffer   *buffer;
	SinkSource	source;
	Target	   *target;
	Relation	rel;
	StringInfoData statement;

	check_not_null(fcinfo, 0, "view");
	check_not_null(fcinfo, 1, "buffer");
	name = read_new_name(PG_GETARG_TEXT_PP(0));
	relid = PG_GETARG_OID(1);
	buffer_check_privilege(relid, ACL_SELECT);
	buffer = buffer_open(relid, AccessShareLock);
	total_check_target(buffer);
	buffer_get_source(buffer, &source);
	target = target_open(&source, false, AccessShareLock);
	rel = relation_open(target->relid, NoLock);

	initStringInfo(&statement);
	appendStringInfo(&statement,
					 "CREATE VIEW %s WITH (security_invoker = true) AS SELECT ",
					 name);
	append_view_columns(&statement, rel, target, relid, schema);
	appendStringInfo(&statement, " FROM %s AS t", target->name);
	execute(statement.data);
	copy_defaults(name, rel);
	execute(psprintf("CREATE TRIGGER sb_view INSTEAD OF INSERT OR UPDATE OR DELETE ON %s"
					 " FOR EACH ROW EXECUTE FUNCTION %s.sb_view_trigger()",
					 name, schema));
	relation_close(rel, NoLock);
	PG_RETURN_OID(get_new_relation(name));
}
