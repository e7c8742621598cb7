/*-------------------------------------------------------------------------
 *
 * launch.c
 *	  Starting the launcher, and waiting for what is loaded after a restart.
 *
 * For processes that count, or look at counts.  What the launcher does is in
 * launcher.c.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "access/xlog.h"
#include "launch.h"
#include "ledger.h"
#include "load.h"
#include "miscadmin.h"
#include "postmaster/bgworker.h"
#include "registry.h"
#include "shutdown.h"
#include "storage/condition_variable.h"
#include "utils/memutils.h"
#include "compat.h"

#define LAUNCHER_RESTART_SECS	1

/* how long to wait for counts to be loaded */
#define LOAD_WAIT_MSECS			10000

/* Fill in the registration of the launcher. */
static void
fill_launcher(BackgroundWorker *worker)
{
	memset(worker, 0, sizeof(BackgroundWorker));
	worker->bgw_flags = BGWORKER_SHMEM_ACCESS |
		BGWORKER_BACKEND_DATABASE_CONNECTION;
	worker->bgw_start_time = BgWorkerStart_RecoveryFinished;
	worker->bgw_restart_time = LAUNCHER_RESTART_SECS;
	strlcpy(worker->bgw_library_name, "statbuffer", BGW_MAXLEN);
	strlcpy(worker->bgw_function_name, "statbuffer_launcher_main", BGW_MAXLEN);
	strlcpy(worker->bgw_name, "statbuffer launcher", BGW_MAXLEN);
	strlcpy(worker->bgw_type, "statbuffer launcher", BGW_MAXLEN);
}

/*
 * Register the launcher to start with the server.  Called when the library is
 * preloaded.
 *
 * Not under pg_upgrade: when it starts the old server, it has already recorded
 * where its transactions end, so nothing may write.  Saved counts stay where
 * they are.
 */
void
launch_register(void)
{
	BackgroundWorker worker;

	if (IsBinaryUpgrade)
		return;
	fill_launcher(&worker);
	RegisterBackgroundWorker(&worker);
}

/*
 * Ensure that there is a launcher.  If there cannot be one, that is logged and
 * flushes wait; the next transaction that counts tries again.  Takes
 * SharedControl.lock if there is none.
 */
void
launch_ensure(void)
{
	BackgroundWorker worker;
	BackgroundWorkerHandle *handle;
	MemoryContext oldcontext;

	/* a process that counts must also save counts if no launcher does */
	shutdown_register_exit();
	if (likely(launcher_slot_is_taken()) || !launcher_slot_needs_process())
		return;

	fill_launcher(&worker);
	oldcontext = MemoryContextSwitchTo(TopMemoryContext);
	if (RegisterDynamicBackgroundWorker(&worker, &handle))
		shutdown_expect_launcher(handle);
	else
		ereport(LOG,
				(errcode(ERRCODE_CONFIGURATION_LIMIT_EXCEEDED),
				 errmsg("could not register the statbuffer launcher"),
				 errdetail("Counts are kept, but nothing is flushed."),
				 errhint("You might need to increase \"%s\".",
						 "max_worker_processes")));
	MemoryContextSwitchTo(oldcontext);
}

/*
 * Register another launcher, to take the place of this one.  Returns false if
 * the postmaster has no slot for it.
 */
bool
launch_successor(void)
{
	BackgroundWorker worker;

	fill_launcher(&worker);
	return RegisterDynamicBackgroundWorker(&worker, NULL);
}

/*
 * Is this the first time in the client's statement?  Notes in `last' that there
 * was one.
 */
static bool
is_first_in_statement(TimestampTz *last)
{
	TimestampTz now = GetCurrentStatementStartTimestamp();
	bool		first = *last != now;

	*last = now;
	return first;
}

/*
 * Counts are in the memory of the primary, so here there is nothing to be seen.
 * Warn of that, once for each statement of the client.  Not in the log, which
 * whoever may read counts could fill, and monitoring would.
 */
static void
warn_standby(void)
{
	static TimestampTz warned = 0;

	if (!is_first_in_statement(&warned))
		return;
	ereport(WARNING_CLIENT_ONLY,
			(errmsg("a standby does not have the counts that are not stored yet"),
			 errhint("Connect to the primary server.")));
}

/*
 * Sleep until more is loaded, perhaps.  Returns false if a caller that has not
 * `warned' has waited for LOAD_WAIT_MSECS, or if it has.  `until' is 0 the first
 * time.
 */
static bool
sleep_for_load(ConditionVariable *cv, ClockTime *until, bool warned)
{
	ClockTime	now = clock_now();

	if (*until == 0)
		*until = clock_add(now, warned ? 0 : LOAD_WAIT_MSECS);
	if (now >= *until)
		return false;
	(void) ConditionVariableTimedSleep(cv, (*until - now) / 1000 + 1,
									   compat_wait_event("StatbufferLoad"));
	return true;
}

static inline bool
is_loaded(Oid relid, uint64 position)
{
	if (likely(!load_is_pending()))
		return true;
	return OidIsValid(relid) &&
		!load_is_pending_for(MyDatabaseId, relid, position);
}

/*
 * Wait until the counts that were saved at the last shutdown are in memory: of
 * the key of a buffer that is at a position (table_position()), of all its keys
 * (LAUNCH_ALL_KEYS), or if `relid' is InvalidOid, of all buffers.  Callers do this
 * before they look at counts.  Returns false, after a warning, if that takes too
 * long, and on a standby, which has no launcher and no counts.
 */
bool
launch_await_load(Oid relid, uint64 position)
{
	static bool warned = false;
	ClockTime	until = 0;
	bool		loaded;

	if (unlikely(RecoveryInProgress()))
	{
		warn_standby();
		return false;
	}
	if (shared_control == NULL)
		registry_attach(false);
	if (likely(is_loaded(relid, position)))
		return true;
	registry_attach(true);
	launch_ensure();

	ConditionVariablePrepareToSleep(&shared_control->load.cv);
	while (!(loaded = is_loaded(relid, position)) &&
		   sleep_for_load(&shared_control->load.cv, &until, warned))
		;
	ConditionVariableCancelSleep();
	if (!loaded && !warned)
	{
		warned = true;
		ereport(WARNING,
				(errmsg("counts that were saved when the server was stopped are not loaded yet"),
				 errhint("The counts are not lost. See the server log for what delays them.")));
	}
	return loaded;
}

/* Has memory all that the ledger has of a buffer?  Needs no lock on the relation. */
static inline bool
ledger_is_loaded(SharedDatabase *database, Oid relid)
{
	SharedBufferKey key = {MyDatabaseId, relid};
	SharedBuffer *buffer;
	bool		loaded;

	if (likely(pg_atomic_read_u32(&database->loaded) != 0))
		return true;
	buffer = registry_lock(&key);
	if (buffer == NULL)
		return false;
	loaded = pg_atomic_read_u32(&buffer->ledger_loaded) != 0;
	registry_unlock(buffer);
	return loaded;
}

/*
 * Counts that the ledger has are not loaded, and cannot be before the transaction
 * ends.  Warn of that, once for each statement of the client.
 */
static void
warn_locked(void)
{
	static TimestampTz warned = 0;

	if (!is_first_in_statement(&warned))
		return;
	ereport(WARNING,
			(errmsg("counts that the ledger of durable buffers has are not loaded yet"),
			 errdetail("They cannot be loaded while this transaction has the buffer locked."),
			 errhint("The counts are not lost. Read them in a transaction that has not locked the buffer.")));
}

/*
 * Wait until the counts that the ledger has of a durable buffer are in memory.
 * Callers do this before they look at counts.  They have a lock on the buffer.  If
 * it is `locked' in a mode that keeps others from counting, and so the keeper from
 * loading, this does not wait.  Returns false, after a warning, if that takes too
 * long or would be in vain, and on a standby, where there is nothing in memory.
 */
bool
launch_await_ledger(Oid relid, bool locked)
{
	static bool warned = false;
	SharedDatabase *database;
	ClockTime	until = 0;
	bool		loaded;

	if (unlikely(RecoveryInProgress()))
		return false;
	registry_attach(true);
	database = ledger_database(MyDatabaseId, true);
	if (likely(ledger_is_loaded(database, relid)))
		return true;
	if (locked)
	{
		warn_locked();
		return false;
	}
	launch_ensure();
	ledger_want(LEDGER_LOAD | LEDGER_URGENT);

	ConditionVariablePrepareToSleep(&database->cv);
	while (!(loaded = ledger_is_loaded(database, relid)) &&
		   sleep_for_load(&database->cv, &until, warned))
		;
	ConditionVariableCancelSleep();
	if (!loaded && !warned)
	{
		warned = true;
		ereport(WARNING,
				(errmsg("counts that the ledger of durable buffers has are not loaded yet"),
				 errhint("The counts are not lost. See the server log for what delays them.")));
	}
	return loaded;
}

/*
 * Has memory all that the ledger has of a durable buffer?  For display, without a
 * lock on the relation.  If not, has it loaded, but does not wait.  On a standby the
 * ledger itself is read.
 */
bool
launch_ledger_is_loaded(Oid relid)
{
	SharedDatabase *database;

	if (RecoveryInProgress())
		return true;
	registry_attach(true);
	database = ledger_database(MyDatabaseId, true);
	if (ledger_is_loaded(database, relid))
		return true;
	launch_ensure();
	ledger_want(LEDGER_LOAD);
	return false;
}
