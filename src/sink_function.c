/*-------------------------------------------------------------------------
 *
 * sink_function.c
 *	  The user's function that stores counts: find it and call it.
 *
 * The function is looked up by the parser's own rules, with the types of the
 * key columns and bigint as arguments, or with arrays of these.  It is looked
 * up again for each batch: compared with the batch that is cheap, and it takes
 * effect at once if a function is replaced, dropped, or moved on the search
 * path.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/xact.h"
#include "catalog/namespace.h"
#include "catalog/objectaccess.h"
#include "catalog/pg_collation.h"
#include "catalog/pg_proc.h"
#include "catalog/pg_type.h"
#include "compat.h"
#include "executor/executor.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "nodes/makefuncs.h"
#include "optimizer/optimizer.h"
#include "parser/parse_func.h"
#include "parser/parse_node.h"
#include "sink.h"
#include "sink_function.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/catcache.h"
#include "utils/fmgrprotos.h"
#include "utils/lsyscache.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"

typedef struct FunctionSink
{
	Sink		sink;
	TupleDesc	desc;
	Oid			funcid;
	bool		takes_arrays;
	bool		returns_bool;
	ParamListInfo params;
	ExprState  *state;
	ExprContext *econtext;
} FunctionSink;

/*
 * Get the types of the arguments: those of the key columns and the count, or
 * arrays of them.  Returns false if a type has no array type.
 */
static bool
argument_types(TupleDesc desc, bool arrays, Oid *types)
{
	for (int i = 0; i < desc->natts; i++)
	{
		types[i] = TupleDescAttr(desc, i)->atttypid;
		if (arrays)
		{
			types[i] = get_array_type(types[i]);
			if (!OidIsValid(types[i]))
				return false;
		}
	}
	types[desc->natts] = arrays ? INT8ARRAYOID : INT8OID;
	return true;
}

/*
 * Build a list of parameters of the given types, as the arguments of a call.
 */
static List *
make_arguments(const Oid *types, int nargs)
{
	List	   *args = NIL;

	for (int i = 0; i < nargs; i++)
	{
		Param	   *param = makeNode(Param);

		param->paramkind = PARAM_EXTERN;
		param->paramid = i + 1;
		param->paramtype = types[i];
		param->paramtypmod = -1;
		param->paramcollid = get_typcollation(types[i]);
		param->location = -1;
		args = lappend(args, param);
	}
	return args;
}

static FuncDetailCode
look_up(List *names, const Oid *types, int nargs, Oid *funcid)
{
	Oid			rettype;
	bool		retset;
	int			nvargs;
	Oid			vatype;
	Oid		   *true_types;

	return compat_func_get_detail(names, nargs, unconstify(Oid *, types),
								  funcid, &rettype, &retset, &nvargs, &vatype,
								  &true_types);
}

/* how many functions to list, at most, that take other arguments */
#define NEAR_MISSES		4

/*
 * List the functions that have the handler's name, in any schema, and may be the
 * ones that were meant.  Returns NULL if there are none.
 */
static char *
near_misses(List *names, int *nfound)
{
	char	   *schema;
	char	   *name;
	CatCList   *functions;
	StringInfoData list;

	DeconstructQualifiedName(names, &schema, &name);
	functions = SearchSysCacheList1(PROCNAMEARGSNSP, CStringGetDatum(name));
	initStringInfo(&list);
	*nfound = 0;
	for (int i = 0; i < functions->n_members; i++)
	{
		Form_pg_proc proc = (Form_pg_proc) GETSTRUCT(&functions->members[i]->tuple);
		List	   *shown = names;

		schema = get_namespace_name(proc->pronamespace);
		if (schema == NULL || isAnyTempNamespace(proc->pronamespace))
			continue;
		if (++*nfound > NEAR_MISSES)
		{
			appendStringInfoString(&list, ", ...");
			break;
		}
		if (list_length(names) > 1 || !FunctionIsVisible(proc->oid))
			shown = list_make2(makeString(schema), makeString(name));
		appendStringInfo(&list, "%s%s", *nfound > 1 ? ", " : "",
						 func_signature_string(shown, proc->pronargs, NIL,
											   proc->proargtypes.values));
	}
	ReleaseCatCacheList(functions);
	return *nfound > 0 ? list.data : NULL;
}

/*
 * Find the function for keys of this shape on the current search path, and the
 * types of its arguments.  If both forms exist, the one with arrays is used.
 * Raises an error if there is none, or none that could be called.
 */
static Oid
find_function(List *names, TupleDesc desc, Oid *types, bool *takes_arrays)
{
	int			nargs = desc->natts + 1;
	FuncDetailCode code = FUNCDETAIL_NOTFOUND;
	Oid			funcid = InvalidOid;
	char	   *others;
	int			nothers;

	Assert(COMPAT_IS_FINALIZED(desc));
	*takes_arrays = argument_types(desc, true, types);
	if (*takes_arrays)
		code = look_up(names, types, nargs, &funcid);
	if (code == FUNCDETAIL_NOTFOUND)
	{
		*takes_arrays = false;
		(void) argument_types(desc, false, types);
		code = look_up(names, types, nargs, &funcid);
	}

	switch (code)
	{
		case FUNCDETAIL_NORMAL:
			break;
		case FUNCDETAIL_NOTFOUND:
			others = near_misses(names, &nothers);
			ereport(ERROR,
					(errcode(ERRCODE_UNDEFINED_FUNCTION),
					 errmsg("handler function %s does not exist",
							func_signature_string(names, nargs, NIL, types)),
					 others == NULL ? 0 : nothers == 1 ?
					 errdetail("There is %s.", others) :
					 errdetail("There are %s.", others),
					 errhint("Create it, or one that takes arrays of these types, or set the buffer's option \"handler\". It must be schema-qualified or on the owner's search path.")));
			break;
		case FUNCDETAIL_MULTIPLE:
			ereport(ERROR,
					(errcode(ERRCODE_AMBIGUOUS_FUNCTION),
					 errmsg("handler function %s is not unique",
							func_signature_string(names, nargs, NIL, types)),
					 errhint("Leave only one that takes these types.")));
			break;
		default:
			ereport(ERROR,
					(errcode(ERRCODE_WRONG_OBJECT_TYPE),
					 errmsg("handler %s is not a plain function",
							func_signature_string(names, nargs, NIL, types)),
					 errhint("A handler cannot be a procedure, an aggregate or a window function.")));
			break;
	}
	return funcid;
}

/*
 * Find the handler for keys of this shape on the current search path.  Raises
 * an error if there is none.  Does not check its owner, result type or
 * privileges: see check().
 */
Oid
handler_find(const char *name, TupleDesc desc, bool *takes_arrays)
{
	Oid		   *types = palloc((desc->natts + 1) * sizeof(Oid));

	return find_function(compat_qualified_name_list(name), desc, types,
						 takes_arrays);
}

/*
 * Check that the function returns what we expect and may run as the buffer's
 * owner; raise an error if not.  Otherwise any user who may create functions
 * in a schema on the owner's search path could have one run as the owner.  A
 * superuser is not considered a member of every role here.
 */
static void
check_function(Oid funcid, Oid owner, bool *returns_bool)
{
	HeapTuple	tuple = SearchSysCache1(PROCOID, ObjectIdGetDatum(funcid));
	Form_pg_proc proc;

	if (!HeapTupleIsValid(tuple))
		elog(ERROR, "cache lookup failed for function %u", funcid);
	proc = (Form_pg_proc) GETSTRUCT(tuple);

	if (proc->proowner != owner && !superuser_arg(proc->proowner) &&
		!compat_is_member(owner, proc->proowner))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("handler function %s does not belong to the buffer's owner",
						format_procedure(funcid)),
				 errdetail("It belongs to role \"%s\".",
						   GetUserNameFromId(proc->proowner, true)),
				 errhint("It must belong to the owner \"%s\", to a role that the owner is a member of, or to a superuser.",
						 GetUserNameFromId(owner, true))));
	if (proc->proretset ||
		(proc->prorettype != VOIDOID && proc->prorettype != BOOLOID))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_FUNCTION_DEFINITION),
				 errmsg("handler function %s must return void or boolean",
						format_procedure(funcid))));
	*returns_bool = proc->prorettype == BOOLOID;
	ReleaseSysCache(tuple);
}

/*
 * Warn if an argument of a PL/pgSQL function has the name of a column that it
 * uses in ON CONFLICT: that is ambiguous, whenever it is called.  Finds the usual
 * case only, by the source text.
 */
static void
warn_if_ambiguous(Oid funcid)
{
	HeapTuple	tuple = SearchSysCache1(PROCOID, ObjectIdGetDatum(funcid));
	Form_pg_proc proc;
	Oid		   *types;
	char	  **names;
	char	   *modes;
	int			nargs;
	Datum		source;
	bool		isnull;

	if (!HeapTupleIsValid(tuple))
		elog(ERROR, "cache lookup failed for function %u", funcid);
	proc = (Form_pg_proc) GETSTRUCT(tuple);
	source = SysCacheGetAttr(PROCOID, tuple, Anum_pg_proc_prosrc, &isnull);
	nargs = get_func_arg_info(tuple, &types, &names, &modes);
	if (strcmp(get_language_name(proc->prolang, false), "plpgsql") != 0 ||
		isnull ||
		strstr(TextDatumGetCString(source), "#variable_conflict") != NULL)
		nargs = 0;
	for (int i = 0; names != NULL && i < nargs; i++)
	{
		char	   *pattern;

		/* a name without characters that have a meaning in a pattern */
		if (names[i][0] == '\0' ||
			strspn(names[i], "abcdefghijklmnopqrstuvwxyz0123456789_") != strlen(names[i]))
			continue;
		pattern = psprintf("\\mON\\s+CONFLICT\\s*\\([^)]*\\m%s\\M", names[i]);
		if (!DatumGetBool(DirectFunctionCall2Coll(texticregexeq,
												  C_COLLATION_OID, source,
												  CStringGetTextDatum(pattern))))
			continue;
		ereport(WARNING,
				(errcode(ERRCODE_AMBIGUOUS_COLUMN),
				 errmsg("argument \"%s\" of handler function %s is ambiguous in ON CONFLICT",
						names[i], format_procedure(funcid)),
				 errdetail("It could refer to either a PL/pgSQL variable or a table column."),
				 errhint("Give the argument another name, such as \"p_%s\", or begin the function with #variable_conflict use_column.",
						 names[i])));
	}
	ReleaseSysCache(tuple);
}

/* SinkMethods.check: is there a handler that the owner could call? */
static void
check(const SinkSource *source)
{
	Oid			owner = source->owner;
	bool		takes_arrays;
	bool		returns_bool;
	Oid			funcid = handler_find(source->options->handler, source->desc,
									  &takes_arrays);

	check_function(funcid, owner, &returns_bool);
	if (isAnyTempNamespace(get_func_namespace(funcid)))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_FUNCTION_DEFINITION),
				 errmsg("handler function %s is temporary",
						format_procedure(funcid)),
				 errdetail("The worker of a buffer is a session of its own."),
				 errhint("Create it in another schema.")));
	if (!compat_may_execute(funcid, owner))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("role \"%s\" does not have EXECUTE privilege on handler function %s",
						GetUserNameFromId(owner, true),
						format_procedure(funcid)),
				 errhint("Grant EXECUTE on the function to the buffer's owner.")));
	warn_if_ambiguous(funcid);
}

/* SinkMethods.prepare: find the handler and prepare to call it. */
static Sink *
prepare(const SinkSource *source)
{
	TupleDesc	desc = source->desc;
	int			nargs = desc->natts + 1;
	FunctionSink *handler = palloc0(sizeof(FunctionSink));
	Oid		   *types = palloc(nargs * sizeof(Oid));
	List	   *names = compat_qualified_name_list(source->options->handler);
	List	   *args;
	ParseState *pstate;
	Node	   *call;
	Expr	   *expr;

	handler->sink.methods = &sink_function;
	handler->desc = desc;
	handler->funcid = find_function(names, desc, types,
									&handler->takes_arrays);
	check_function(handler->funcid, source->owner, &handler->returns_bool);

	/* let the parser handle casts, polymorphic types and defaults */
	pstate = make_parsestate(NULL);
	pstate->p_expr_kind = EXPR_KIND_SELECT_TARGET;
	args = make_arguments(types, nargs);
	call = ParseFuncOrColumn(pstate, names, args, NULL,
							 makeFuncCall(names, args, COERCE_EXPLICIT_CALL,
										  -1),
							 false, -1);
	if (!IsA(call, FuncExpr) || ((FuncExpr *) call)->funcid != handler->funcid)
		elog(ERROR, "handler function was not resolved as before");
	free_parsestate(pstate);

	handler->params = makeParamList(nargs);
	for (int i = 0; i < nargs; i++)
	{
		handler->params->params[i].ptype = types[i];
		handler->params->params[i].pflags = 0;
	}

	/*
	 * ExecInitExpr() calls the object access hook for functions that are
	 * executed, but not for one that was inlined.
	 */
	expr = expression_planner((Expr *) call);
	if (!IsA(expr, FuncExpr) || ((FuncExpr *) expr)->funcid != handler->funcid)
		InvokeFunctionExecuteHook(handler->funcid);
	handler->state = ExecInitExprWithParams(expr, handler->params);
	handler->econtext = CreateStandaloneExprContext();
	handler->econtext->ecxt_param_list_info = handler->params;
	return &handler->sink;
}

static void
call_function(FunctionSink *handler)
{
	Datum		result;
	bool		isnull;

	/* make the effects of earlier calls visible to this one */
	CommandCounterIncrement();
	PushActiveSnapshot(GetTransactionSnapshot());
	result = ExecEvalExprSwitchContext(handler->state, handler->econtext,
									   &isnull);
	PopActiveSnapshot();

	if (handler->returns_bool && (isnull || !DatumGetBool(result)))
		ereport(ERROR,
				(errcode(ERRCODE_TRIGGERED_ACTION_EXCEPTION),
				 isnull ? errmsg("handler function returned null") :
				 errmsg("handler function returned false")));
	ResetExprContext(handler->econtext);
}

static void
set_parameter(FunctionSink *handler, int i, Datum value, bool isnull)
{
	handler->params->params[i].value = value;
	handler->params->params[i].isnull = isnull;
}

static void
call_with_arrays(FunctionSink *handler, SinkKey *keys, int nkeys)
{
	int			nparams = handler->desc->natts + 1;
	Datum	   *arrays = palloc(nparams * sizeof(Datum));

	sink_make_arrays(handler->desc, keys, nkeys, arrays);
	for (int i = 0; i < nparams; i++)
		set_parameter(handler, i, arrays[i], false);
	call_function(handler);
}

/*
 * SinkMethods.deliver: call the handler, once for all keys or once for each.
 * Raises the handler's errors, and one of its own if the handler returns false
 * or null.
 */
static int
deliver(Sink *sink, SinkKey *keys, int nkeys, SinkProgress progress, void *arg)
{
	FunctionSink *handler = (FunctionSink *) sink;

	if (handler->takes_arrays)
	{
		if (!progress(0, nkeys, arg))
			return 0;
		call_with_arrays(handler, keys, nkeys);
		return nkeys;
	}

	for (int i = 0; i < nkeys; i++)
	{
		int			column;

		if (!progress(i, 1, arg))
			return i;
		for (column = 0; column < handler->desc->natts; column++)
			set_parameter(handler, column, keys[i].values[column],
						  keys[i].isnull[column]);
		set_parameter(handler, column, Int64GetDatum(keys[i].count), false);
		call_function(handler);
	}
	return nkeys;
}

const SinkMethods sink_function = {
	.check = check,
	.prepare = prepare,
	.deliver = deliver
};
