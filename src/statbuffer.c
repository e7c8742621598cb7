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
#include "ddl.h"
#include "executor/executor.h"
#include "fdw.h"
#include "fmgr.h"
#include "launch.h"
#include "miscadmin.h"
#include "pending.h"
#include "shmem.h"
#include "statbuffer.h"
#include "storage/ipc.h"
#include "tcop/utility.h"
#include "utils/guc.h"

COMPAT_MODULE_MAGIC("statbuffer", STATBUFFER_VERSION);

extern PGDLLEXPORT void _PG_init(void);

int			statbuffer_max_memory;
int			statbuffer_max_shutdown;
int			statbuffer_max_workers;

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
 * Utility hook: ensure that the part of publishing that can fail runs before
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

	/* look now: a statement that rolls back may free itself */
	NodeTag		type = nodeTag(pstmt->utilityStmt);

	if (type == T_TransactionStmt &&
		((TransactionStmt *) pstmt->utilityStmt)->kind == TRANS_STMT_COMMIT)
		pending_come_first(true);
	next(pstmt, query_string, read_only_tree, context, params, query_env, dest,
		 qc);
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
	DefineCustomIntVariable("statbuffer.max_memory",
							"Sets the maximum amount of dynamic shared memory for counts.",
							"When most of it is in use, keys are flushed before they are due. When all of it is in use, increments of new keys are errors; those of keys already held still work.",
							&statbuffer_max_memory,
							256 * 1024,
							4 * 1024, MAX_KILOBYTES,
							PGC_SIGHUP,
							GUC_UNIT_KB,
							NULL, NULL, NULL);
	DefineCustomIntVariable("statbuffer.max_shutdown",
							"Sets the maximum time for the last flush of a buffer when the server stops.",
							"It limits the option \"shutdown\" of a buffer, which its owner sets. Counts that are not stored by then are saved to a file.",
							&statbuffer_max_shutdown,
							60 * 1000,
							0, SHUTDOWN_MAX_MSECS,
							PGC_SIGHUP,
							GUC_UNIT_MS,
							NULL, NULL, NULL);
	DefineCustomIntVariable("statbuffer.max_workers",
							"Sets the maximum number of worker processes that flush buffers at the same time.",
							"Worker processes are taken from the pool established by \"max_worker_processes\". When more buffers are busy, the workers take turns.",
							&statbuffer_max_workers,
							4,
							1, 1024,
							PGC_SIGHUP,
							0,
							NULL, NULL, NULL);
	MarkGUCPrefixReserved("statbuffer");

	buffer_init();
	ddl_init();
	pending_init();
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
