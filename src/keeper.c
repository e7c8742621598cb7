/*-------------------------------------------------------------------------
 *
 * keeper.c
 *	  The process that keeps the ledger of a database.
 *
 * There is one at a time for each database with durable buffers, if there is
 * anything to do; keepers.c starts it.  It is connected as the bootstrap
 * superuser, and runs nobody's code.  Its tasks are in recover.c, each in a
 * transaction of its own:
 *
 *		load		after a restart, what only the ledger has
 *		sweep		what prepared transactions have counted
 *		rotate		the ledger, when it is large
 *
 * A task is done when it is wanted, and again at the time that it says itself.
 * One that fails is tried again after a pause, which doubles.  All that is in
 * shared memory (LedgerTask), so that it does not matter which process does it:
 * one that has nothing to do for a while leaves.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "compat.h"
#include "ddl.h"
#include "keeper.h"
#include "launch.h"
#include "ledger.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "recover.h"
#include "storage/ipc.h"
#include "storage/procsignal.h"
#include "utils/backend_status.h"
#include "utils/guc.h"
#include "utils/memutils.h"

/* the pause after the first failure, and the longest one */
#define RETRY_MSECS			1000
#define RETRY_MAX_MSECS		60000

/* how often to look again at what must wait for others */
#define LOOK_MSECS			1000

/* an error is logged again after this */
#define LOG_AGAIN_MSECS		60000

/*
 * If the library is not preloaded, look this often whether a session that does
 * not know us needs the database alone; then stay out of it for as long.
 */
#define STRANGER_MSECS		1000

/* A task, and what pg_stat_activity.query says of it. */
typedef struct Task
{
	const char *activity;
	RecoverResult (*run) (void);
} Task;

/* by the number of the bit in SharedDatabase.wants */
static const Task tasks[LEDGER_TASKS] = {
	{"loading counts of durable buffers from the ledger", recover_load},
	{"looking for what prepared transactions have counted", recover_sweep},
	{"rotating the ledger of durable buffers", recover_rotate}
};

static SharedDatabase *database;

/* is a transaction active?  Shared with the signal handler. */
static volatile sig_atomic_t in_task = false;

/*
 * Signal handler for SIGTERM.  A task can be done again, by the next keeper: end
 * at once, for the server may be stopping, or a session may be waiting for us.
 */
static void
end_requested(SIGNAL_ARGS)
{
	int			save_errno = errno;

	ShutdownRequestPending = true;
	if (in_task)
	{
		ProcDiePending = true;
		InterruptPending = true;
	}
	SetLatch(MyLatch);
	errno = save_errno;
}

/*
 * before_shmem_exit callback.  It is registered before the one that rolls back
 * the transaction in progress, so it runs after that.
 */
static void
keeper_exit(int code, Datum arg)
{
	LWLockReleaseAll();
	ledger_release_keeper();
}

/*
 * Settings of the role and of the database must not have an effect on what we
 * do.
 */
static void
set_options(void)
{
	static const char *const options[][2] = {
		{"role", "none"},
		{"search_path", "pg_catalog"},
		{"default_transaction_read_only", "off"},
		{"default_transaction_isolation", "read committed"},
		{"default_transaction_deferrable", "off"},
		{"statement_timeout", "0"},
		{"transaction_timeout", "0"},
		{"lock_timeout", "0"},
		{"idle_in_transaction_session_timeout", "0"},
		{"zero_damaged_pages", "off"}
	};

	for (int i = 0; i < lengthof(options); i++)
		if (GetConfigOption(options[i][0], true, false) != NULL)
			SetConfigOption(options[i][0], options[i][1], PGC_SUSET,
							PGC_S_OVERRIDE);
}

/*
 * Log an error, unless one was logged within LOG_AGAIN_MSECS.
 */
static void
log_error(ErrorData *edata)
{
	if (!clock_limit(&database->logged_at, clock_now(), LOG_AGAIN_MSECS))
		return;
	ereport(LOG,
			(errcode(edata->sqlerrcode),
			 errmsg("statbuffer could not keep the ledger of database %u: %s",
					MyDatabaseId, edata->message),
			 edata->detail ?
			 errdetail_internal("%s", edata->detail) : 0,
			 edata->hint ? errhint("%s", edata->hint) : 0));
}

/*
 * The extension is not there, and so neither is a ledger: nothing is to be done.
 */
static void
forget_tasks(void)
{
	for (int i = 0; i < LEDGER_TASKS; i++)
		database->tasks[i].again_at = LEDGER_NEVER;
	pg_atomic_write_u32(&database->wants, 0);
	pg_atomic_write_u32(&database->loaded, 1);
}

/* Do a task in a transaction of its own.  Returns false if it has failed. */
static bool
try_task(int number, RecoverResult *result)
{
	MemoryContext context = CurrentMemoryContext;
	volatile bool done = false;
	LedgerTables tables;

	SetCurrentStatementStartTimestamp();
	StartTransactionCommand();
	PG_TRY();
	{
		if (ledger_find_tables(&tables, true))
			*result = tasks[number].run();
		else
		{
			forget_tasks();
			*result = RECOVER_DONE;
		}
		CommitTransactionCommand();
		done = true;
	}
	PG_CATCH();
	{
		ErrorData  *edata;

		HOLD_INTERRUPTS();
		MemoryContextSwitchTo(context);
		edata = CopyErrorData();
		FlushErrorState();
		AbortCurrentTransaction();
		LWLockReleaseAll();
		log_error(edata);
		FreeErrorData(edata);
		RESUME_INTERRUPTS();
	}
	PG_END_TRY();
	MemoryContextSwitchTo(context);
	return done;
}

/*
 * Do a task, and set when to do it again.  Until it is done, or has failed, it is
 * to be done at once, in case that this process ends.
 */
static void
do_task(int number)
{
	LedgerTask *task = &database->tasks[number];
	uint32		bits = 1 << number;
	RecoverResult result;
	ClockTime	now;

	/* after the signal handler was told: see there */
	in_task = true;
	if (ShutdownRequestPending)
	{
		in_task = false;
		return;
	}
	if (bits == LEDGER_LOAD)
		bits |= LEDGER_URGENT;
	task->again_at = 0;
	(void) pg_atomic_fetch_and_u32(&database->wants, ~bits);
	pgstat_report_activity(STATE_RUNNING, tasks[number].activity);
	if (try_task(number, &result))
	{
		task->failures = 0;
		task->not_before = 0;
		now = clock_now();
		if (result == RECOVER_LATER)
			task->again_at = clock_add(now, LOOK_MSECS);
		else if (result == RECOVER_DONE)
			task->again_at = LEDGER_NEVER;
	}
	else
	{
		now = clock_now();
		task->again_at = task->not_before =
			clock_add(now, clock_double(RETRY_MSECS, task->failures++,
										RETRY_MAX_MSECS));
	}
	in_task = false;

	/*
	 * What was prepared before the restart may be committed any time.  What
	 * was large then may be the ledger that is not current now.
	 */
	if (bits & LEDGER_LOAD)
		(void) pg_atomic_fetch_or_u32(&database->wants,
									  LEDGER_SWEEP | LEDGER_ROTATE);

	pg_atomic_fetch_add_u64(&database->nrounds, 1);
	ConditionVariableBroadcast(&database->cv);

	/* other databases wait no longer */
	if (bits & LEDGER_LOAD)
		launcher_slot_wake();
	pgstat_report_stat(true);
	pgstat_report_activity(STATE_IDLE, NULL);
}

/* Must the keeper end? */
static bool
must_end(void)
{
	static ClockTime looked_at = 0;

	if (ConfigReloadPending)
	{
		ConfigReloadPending = false;
		ProcessConfigFile(PGC_SIGHUP);
	}
	if (ShutdownRequestPending || ddl_evicted_until(MyDatabaseId) != 0)
		return true;
	if (!clock_limit(&looked_at, clock_now(), STRANGER_MSECS) ||
		!ddl_database_is_wanted())
		return false;

	/* another keeper would only wait for that lock */
	ledger_start_keeper_after(database, clock_add(clock_now(), STRANGER_MSECS));
	return true;
}

/*
 * Find the task that is due first, and set `next' to when that is.
 */
static int
find_task(ClockTime *next)
{
	int			first = 0;

	*next = LEDGER_NEVER;
	for (int i = 0; i < LEDGER_TASKS; i++)
	{
		ClockTime	due = ledger_task_due(database, i);

		if (due < *next)
		{
			*next = due;
			first = i;
		}
	}
	return first;
}

/* The main function of a keeper.  Its argument is the OID of the database. */
void
statbuffer_keeper_main(Datum main_arg)
{
	ClockTime	stay_until = 0;
	bool		has_loaded = false;

	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, end_requested);
	pqsignal(SIGINT, PG_SIG_IGN);	/* the same would be done again */
	BackgroundWorkerUnblockSignals();

	if (!shmem_open(LOG))
		proc_exit(0);
	before_shmem_exit(keeper_exit, (Datum) 0);
	BackgroundWorkerInitializeConnectionByOid(DatumGetObjectId(main_arg),
											  InvalidOid, COMPAT_WORKER_FLAGS);
	set_options();
	(void) registry_attach(true);
	database = ledger_database(MyDatabaseId, true);
	if (!ledger_claim_keeper())
		proc_exit(0);

	/* whatever we are wanted for, what can be loaded comes first */
	if (pg_atomic_read_u32(&database->loaded) == 0 &&
		ledger_task_due(database, 0) == LEDGER_NEVER)
		ledger_want(LEDGER_LOAD);
	(void) MemoryContextSwitchTo(AllocSetContextCreate(TopMemoryContext,
													   "statbuffer keeper",
													   ALLOCSET_DEFAULT_SIZES));

	for (;;)
	{
		ClockTime	next;
		ClockTime	now;
		int			task;

		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
		if (must_end())
			break;
		task = find_task(&next);
		now = clock_now();
		if (next <= now)
		{
			do_task(task);
			MemoryContextReset(CurrentMemoryContext);

			/*
			 * Who has wanted something may soon want something else.  But
			 * after a restart, other databases wait to be loaded.
			 */
			if (task == 0)
				has_loaded = true;
			else if (!has_loaded)
				stay_until = clock_add(clock_now(), KEEPER_STAY_MSECS);
			continue;
		}
		if (now < stay_until)
			next = Min(next, stay_until);
		else if (next > clock_add(now, KEEPER_STAY_MSECS))
			break;
		(void) WaitLatch(MyLatch,
						 WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
						 clock_get_timeout(next, now),
						 compat_wait_event("StatbufferKeeperMain"));
	}
	proc_exit(0);
}
