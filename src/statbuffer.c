/*-------------------------------------------------------------------------
 *
 * statbuffer.c
 *	  Module entry: settings, hooks, registration.
 *
 * The rooms of this module, from the outside in:
 *
 * functions.c	SQL functions
 * trigger.c	the trigger function
 * fdw.c		the foreign table
 * stats.c		the view and sb_keys()
 * buffer.c		what a buffer is: shape, options, owner
 * shape.c		what the stored forms of its keys consist of
 * key.c		a key's stored form
 * pending.c	what the current transaction has counted
 * counters.c	the shared counters
 * batch.c		the worker's side of them: take, settle, give back
 * schedule.c	which key is due when
 * shared.c		the shared memory area
 * launcher.c	the process that starts workers
 * worker.c		the process that flushes a busy buffer
 * flush.c		one flush: take, hand over, commit, judge what fails
 * handler.c	the user's function that stores counts
 * owner.c		where a session of a buffer's owner looks
 * saved.c		the file of counts that were not stored at shutdown
 * stopping.c	what is done when the server stops
 * clock.c		the clock that nobody can set
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "buffer.h"
#include "catalog/objectaccess.h"
#include "commands/dbcommands.h"
#include "commands/defrem.h"
#include "compat.h"
#include "executor/executor.h"
#include "fdw.h"
#include "fmgr.h"
#include "launcher.h"
#include "miscadmin.h"
#include "pending.h"
#include "shared.h"
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
static object_access_hook_type prev_object_access_hook = NULL;
static ProcessUtility_hook_type prev_ProcessUtility_hook = NULL;
static ExecutorEnd_hook_type prev_ExecutorEnd_hook = NULL;

static void
shmem_request(void)
{
	if (prev_shmem_request_hook)
		prev_shmem_request_hook();
	shared_request();
}

/* Workers see at once what becomes of their buffers. */
static void
object_access(ObjectAccessType access, Oid classId, Oid objectId, int subId,
			  void *arg)
{
	if (prev_object_access_hook)
		prev_object_access_hook(access, classId, objectId, subId, arg);
	if (access == OAT_POST_ALTER || access == OAT_DROP)
		buffer_note_change(classId, objectId);
}

/*
 * The database that a statement needs for itself, without other processes
 * connected to it; InvalidOid for none.  `force' is set when it terminates
 * them.
 */
static Oid
database_wanted_alone(Node *statement, bool *force)
{
	const char *template;
	ListCell   *lc;

	*force = false;
	switch (nodeTag(statement))
	{
		case T_DropdbStmt:
			foreach(lc, castNode(DropdbStmt, statement)->options)
				if (strcmp(lfirst_node(DefElem, lc)->defname, "force") == 0)
				*force = true;
			return get_database_oid(castNode(DropdbStmt, statement)->dbname,
									true);
		case T_RenameStmt:
			if (castNode(RenameStmt, statement)->renameType == OBJECT_DATABASE)
				return get_database_oid(castNode(RenameStmt, statement)->subname,
										true);
			break;
		case T_CreatedbStmt:
			template = "template1";
			foreach(lc, castNode(CreatedbStmt, statement)->options)
			{
				DefElem    *option = lfirst_node(DefElem, lc);

				if (strcmp(option->defname, "template") == 0 &&
					option->arg != NULL)
					template = defGetString(option);
			}
			return get_database_oid(template, true);
		case T_AlterDatabaseStmt:
			foreach(lc, castNode(AlterDatabaseStmt, statement)->options)
			{
				DefElem    *option = lfirst_node(DefElem, lc);

				if (strcmp(option->defname, "tablespace") == 0)
					return get_database_oid(castNode(AlterDatabaseStmt,
													 statement)->dbname,
											true);
			}
			break;
		default:
			break;
	}
	return InvalidOid;
}

static void
next_process_utility(PlannedStmt *pstmt, const char *query_string,
					 bool read_only_tree, ProcessUtilityContext context,
					 ParamListInfo params, QueryEnvironment *query_env,
					 DestReceiver *dest, QueryCompletion *qc)
{
	if (prev_ProcessUtility_hook)
		prev_ProcessUtility_hook(pstmt, query_string, read_only_tree, context,
								 params, query_env, dest, qc);
	else
		standard_ProcessUtility(pstmt, query_string, read_only_tree, context,
								params, query_env, dest, qc);
}

/* A statement may have had another library do things when we commit. */
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
 * Ask our workers to leave a database that somebody needs for himself, and see
 * that a transaction's counts come first when it commits.
 */
static void
process_utility(PlannedStmt *pstmt, const char *query_string,
				bool read_only_tree, ProcessUtilityContext context,
				ParamListInfo params, QueryEnvironment *query_env,
				DestReceiver *dest, QueryCompletion *qc)
{
	bool		force;
	Oid			dboid = database_wanted_alone(pstmt->utilityStmt, &force);

	/* who may not do it must not have workers leave for it */
	if (!OidIsValid(dboid) || dboid == MyDatabaseId ||
		!compat_owns_database(dboid, GetUserId()))
	{
		/* looked at now: a statement that rolls back may free itself */
		NodeTag		type = nodeTag(pstmt->utilityStmt);

		if (type == T_TransactionStmt &&
			((TransactionStmt *) pstmt->utilityStmt)->kind == TRANS_STMT_COMMIT)
			pending_come_first(true);
		next_process_utility(pstmt, query_string, read_only_tree, context,
							 params, query_env, dest, qc);
		if (type == T_CopyStmt || type == T_TruncateStmt || type == T_LoadStmt)
			pending_come_first(false);
		return;
	}

	PG_TRY();
	{
		launcher_evict(dboid, !force);
		next_process_utility(pstmt, query_string, read_only_tree, context,
							 params, query_env, dest, qc);
	}
	PG_FINALLY();
	{
		launcher_admit(dboid);
	}
	PG_END_TRY();
}

void
_PG_init(void)
{
	DefineCustomIntVariable("statbuffer.max_memory",
							"Sets the most dynamic shared memory that counts may take.",
							"Near it keys are flushed before they are due. At it increments of new keys are errors; those of keys already held still work.",
							&statbuffer_max_memory,
							256 * 1024,
							4 * 1024, MAX_KILOBYTES,
							PGC_SIGHUP,
							GUC_UNIT_KB,
							NULL, NULL, NULL);
	DefineCustomIntVariable("statbuffer.max_shutdown",
							"Sets the most time that the last flush of a buffer may take when the server stops.",
							"The option \"shutdown\" of a buffer, which its owner sets, counts for no more. What is not stored by then is saved to a file.",
							&statbuffer_max_shutdown,
							60 * 1000,
							0, SHUTDOWN_MAX_MSECS,
							PGC_SIGHUP,
							GUC_UNIT_MS,
							NULL, NULL, NULL);
	DefineCustomIntVariable("statbuffer.max_workers",
							"Sets the most worker processes that flush buffers at a time.",
							"They are taken from max_worker_processes. When more buffers are busy, workers take turns.",
							&statbuffer_max_workers,
							4,
							1, 1024,
							PGC_SIGHUP,
							0,
							NULL, NULL, NULL);
	MarkGUCPrefixReserved("statbuffer");

	buffer_init();
	pending_init();
	prev_object_access_hook = object_access_hook;
	object_access_hook = object_access;
	prev_ProcessUtility_hook = ProcessUtility_hook;
	ProcessUtility_hook = process_utility;
	prev_ExecutorEnd_hook = ExecutorEnd_hook;
	ExecutorEnd_hook = executor_end;

	if (!process_shared_preload_libraries_in_progress)
		return;

	if (COMPAT_MAIN_SEGMENT)
	{
		prev_shmem_request_hook = shmem_request_hook;
		shmem_request_hook = shmem_request;
	}
	launcher_register();
}
