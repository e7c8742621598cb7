/*-------------------------------------------------------------------------
 *
 * create.c
 *	  Creating buffers: the default buffer, and one for a table's column.
 *
 * What is made here can also be written by hand, as CREATE FOREIGN TABLE.
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
#include "executor/spi.h"
#include "foreign/foreign.h"
#include "functions.h"
#include "lib/stringinfo.h"
#include "nodes/makefuncs.h"
#include "sink.h"
#include "sink_function.h"
#include "target.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/syscache.h"

COMPAT_FUNCTION_INFO_V1(sb_create);

/* Run a utility statement as the current user. */
static void
execute(const char *statement)
{
	SPI_connect();
	if (SPI_execute(statement, false, 0) != SPI_OK_UTILITY)
		elog(ERROR, "could not execute \"%s\"", statement);
	SPI_finish();
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
	List	   *names;
	RangeVar   *range;
	Relation	rel;
	StringInfoData statement;
	Oid			relid;
	SbBuffer   *buffer;
	SinkSource	source;

	check_not_null(fcinfo, 0, "buffer");
	check_not_null(fcinfo, 1, "target");
	check_not_null(fcinfo, 2, "column");
	check_not_null(fcinfo, 3, "options");
	names = textToQualifiedNameList(PG_GETARG_TEXT_PP(0));
	range = makeRangeVarFromNameList(names);
	rel = try_relation_open(PG_GETARG_OID(1), AccessShareLock);
	if (rel == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_TABLE),
				 errmsg("relation with OID %u does not exist",
						PG_GETARG_OID(1))));

	initStringInfo(&statement);
	appendStringInfo(&statement, "CREATE FOREIGN TABLE %s (",
					 NameListToQuotedString(names));
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

	relid = RangeVarGetRelid(range, NoLock, false);
	buffer = buffer_open(relid, AccessShareLock);
	buffer_get_source(buffer, &source);
	sink_for(source.options)->check(&source);
	PG_RETURN_OID(relid);
}
