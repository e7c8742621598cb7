/*-------------------------------------------------------------------------
 *
 * statbuffer.c
 *	  Module entry: settings, hooks, registration.
 *
 * src/README.md says which file does what.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "buffer.h"
#include "compat.h"
#include "convert.h"
#include "ddl.h"
#include "define.h"
#include "durable.h"
#include "executor/executor.h"
#include "fdw.h"
#include "fmgr.h"
#include "launch.h"
#include "ledger.h"
#include "miscadmin.h"
#include "pending.h"
#include "settings.h"
#include "shmem.h"
#include "storage/ipc.h"
#include "tcop/utility.h"

COMPAT_MODULE_MAGIC("statbuffer", SETTINGS_VERSION);

extern PGDLLEXPORT void _PG_init(void);

static shmem_request_hook_type prev_shmem_request_hook = NULL;
static ProcessUtility_hook_type prev_ProcessUtility_hook = NULL;
static ExecutorEnd_hook_type prev_ExecutorEnd_hook = NULL;

/* Shared memory hook: reserve space in the main segment. */
static void
request_shmem(void)
{
	if (prev_shmem_request_hook)
		prev_shmem_request_hook();
	shmem_request();
}

/*
 * Executor hook: a statement that used foreign tables of other wrappers may
 * have made their libraries register commit callbacks.  See
 * pending_come_first().
 */
static void
executor_end(QueryDesc *query)
{
	if (pending_any() && fdw_others_used(query->estate))
		pending_come_first(false);
	if (prev_ExecutorEnd_hook)
		prev_ExecutorEnd_hook(query);
	else
		standard_ExecutorEnd(query);
}

/*
 * Utility hook: evict workers while a statement needs exclusive use of a
 * database, check what a statement makes of buffers, and ensure that the part of publishing that can fail runs before
 * the commit callbacks of other libraries.  See pending_come_first().
 */
static void
process_utility(PlannedStmt *pstmt, const char *query_string,
				bool read_only_tree, ProcessUtilityContext context,
				ParamListInfo params, QueryEnvironment *query_env,
				DestReceiver *dest, QueryCompletion *qc)
{
	ProcessUtility_hook_type next = prev_ProcessUtility_hook ?
	prev_ProcessUtility_hook : standard_ProcessUtility;
	bool		force;
	bool		commits_prepared;
	Oid			dboid = ddl_wanted_database(pstmt->utilityStmt, &force);

	/* look now: a statement that rolls back may free itself */
	NodeTag		type = nodeTag(pstmt->utilityStmt);

	if (OidIsValid(dboid))
	{
		PG_TRY();
		{
			ddl_evict(dboid, !force);
			next(pstmt, query_string, read_only_tree, context, params,
				 query_env, dest, qc);
		}
		PG_FINALLY();
		{
			ddl_admit(dboid);
		}
		PG_END_TRY();
		return;
	}

	if (type == T_DropStmt || type == T_DropOwnedStmt)
		durable_before_drop(pstmt->utilityStmt);
	if (define_may_alter(pstmt->utilityStmt))
	{
		DefineWatch watch;

		define_begin(&watch);
		PG_TRY();
		{
			next(pstmt, query_string, read_only_tree, context, params,
				 query_env, dest, qc);
			define_check(&watch);
		}
		PG_FINALLY();
		{
			define_end(&watch);
		}
		PG_END_TRY();
		return;
	}

	commits_prepared = type == T_TransactionStmt &&
		((TransactionStmt *) pstmt->utilityStmt)->kind == TRANS_STMT_COMMIT_PREPARED;
	if (type == T_RefreshMatViewStmt)
		ledger_check_refresh(((RefreshMatViewStmt *) pstmt->utilityStmt)->relation);
	if (type == T_TransactionStmt &&
		((TransactionStmt *) pstmt->utilityStmt)->kind == TRANS_STMT_COMMIT)
		pending_come_first(true);
	next(pstmt, query_string, read_only_tree, context, params, query_env, dest,
		 qc);
	if (commits_prepared)
		durable_commit_prepared();
	if (type == T_CopyStmt || type == T_TruncateStmt || type == T_LoadStmt)
		pending_come_first(false);
}

/*
 * Module entry point: define settings, set up the rooms and install hooks.  If
 * preloaded, also register the launcher.
 */
void
_PG_init(void)
{
	settings_init();
	ledger_init();
	buffer_init();
	ddl_init();
	durable_init();
	pending_init();
	convert_init();
	prev_ProcessUtility_hook = ProcessUtility_hook;
	ProcessUtility_hook = process_utility;
	prev_ExecutorEnd_hook = ExecutorEnd_hook;
	ExecutorEnd_hook = executor_end;

	if (!process_shared_preload_libraries_in_progress)
		return;

	if (COMPAT_MAIN_SEGMENT)
	{
		prev_shmem_request_hook = shmem_request_hook;
		shmem_request_hook = request_shmem;
	}
	launch_register();
}
