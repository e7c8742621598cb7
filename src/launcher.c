/*-------------------------------------------------------------------------
 *
 * launcher.c
 *	  The process that starts workers for buffers that need one.
 *
 * It is connected to no database and sees only the shared catalogs.  It
 * sleeps until somebody sets its latch: whoever schedules a key of a buffer
 * that has no worker, and every worker that leaves.  Then it looks through
 * the registry, and starts workers for the buffers whose keys come due first,
 * as far as there are slots.  When there are none left, it tells the workers
 * that others wait.
 *
 * Preloaded, it starts with the server; else the first transaction that
 * counts something registers it.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/xact.h"
#include "access/xlog.h"
#include "catalog/pg_authid.h"
#include "catalog/pg_database.h"
#include "compat.h"
#include "ddl.h"
#include "launch.h"
#include "launcher.h"
#include "load.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "registry.h"
#include "statbuffer.h"
#include "shutdown.h"
#include "storage/condition_variable.h"
#include "storage/ipc.h"
#include "storage/proc.h"
#include "storage/procarray.h"
#include "storage/procsignal.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"
#include "worker.h"


/* after a worker that didn't come up, or a full table of the postmaster's */
#define START_RETRY_MSECS		1000
#define START_RETRY_MAX_MSECS	60000

/* what lasts is told in the log so often */
#define LOG_AGAIN_MSECS			600000

/* when there are some for so long, they don't just wait for an idle worker */
#define LOG_FULL_MSECS			3000



/* memory that is short is looked after so often */
#define RELIEVE_AGAIN_MSECS		1000

/* while it waits to be replaced, the launcher looks for a shutdown so often */
#define HAND_OVER_LOOK_MSECS	1000

/* after what was saved could not be loaded for now */
#define LOAD_RETRY_MSECS		1000

/* A worker that this process has started and that may still be there. */
typedef struct StartedWorker
{
	SharedBufferKey key;
	BackgroundWorkerHandle *handle;
} StartedWorker;

/* A buffer that needs a worker. */
typedef struct Candidate
{
	SharedBufferKey key;
	Oid			owner;
	ClockTime	due;
	ClockTime	not_before;		/* no worker may be started before this */
} Candidate;

static List *started = NIL;
static ClockTime register_after = 0;
static int	register_failures = 0;

/* ------------------------------------------------------------------------
 * For other processes
 * ------------------------------------------------------------------------
 */

/* ------------------------------------------------------------------------
 * The launcher
 * ------------------------------------------------------------------------
 */

static void
launcher_exit(int code, Datum arg)
{
	LWLockReleaseAll();
	registry_release_all(code);
	pg_atomic_write_u32(&shared_control->waiting, 0);
	launcher_slot_release();
}

/*
 * When to try again after so many failures in a row.
 */
static ClockTime
retry_time(int failures)
{
	return clock_add(clock_now(),
					 clock_double(START_RETRY_MSECS, failures - 1,
								  START_RETRY_MAX_MSECS));
}

/* A worker could not be started, or did not come up. */
static void
start_failed(const SharedBufferKey *key, const char *message)
{
	SharedBuffer *buffer = registry_lock(key);

	if (buffer == NULL)
		return;
	registry_start_after(buffer, retry_time(registry_start_failed(buffer)));
	registry_set_error(buffer, message, true);
	registry_unlock(buffer);
}

/*
 * Forget the workers that are gone, and note those that did not get as far as
 * their database: it may not allow connections, or the role may not.
 */
static void
check_started(void)
{
	ListCell   *lc;

	foreach(lc, started)
	{
		StartedWorker *worker = lfirst(lc);
		SharedBuffer *buffer;
		bool		failed = false;
		pid_t		pid;

		if (GetBackgroundWorkerPid(worker->handle, &pid) != BGWH_STOPPED)
			continue;

		buffer = registry_lock(&worker->key);
		if (buffer != NULL)
		{
			failed = buffer->slot.pid == 0 && !buffer->slot.connected;
			registry_unlock(buffer);
		}
		if (failed)
			start_failed(&worker->key, _("The worker process could not connect to the database; see the server log."));
		pfree(worker->handle);
		pfree(worker);
		started = foreach_delete_current(started, lc);
	}
}

/* Is a worker on its way that has not claimed its buffer yet? */
static bool
is_starting(const SharedBufferKey *key)
{
	ListCell   *lc;

	foreach(lc, started)
	{
		StartedWorker *worker = lfirst(lc);

		if (worker->key.dboid == key->dboid && worker->key.relid == key->relid)
			return true;
	}
	return false;
}

/* The database is gone, and so is what was counted there. */
static void
remove_database(Oid dboid)
{
	for (;;)
	{
		RegistryScan scan;
		SharedBuffer *buffer;
		SharedBufferKey key = {InvalidOid, InvalidOid};

		registry_begin_scan(&scan);
		while ((buffer = registry_next(&scan)) != NULL)
			if (buffer->key.dboid == dboid && buffer->slot.pid == 0)
				key = buffer->key;
		registry_end_scan(&scan);

		if (!OidIsValid(key.dboid))
			break;
		buffer = registry_claim(key.dboid, key.relid);
		if (buffer != NULL)
			registry_drop(buffer, true);
	}
}

/* Free what belongs to databases that were dropped while nobody looked. */
static void
remove_gone_databases(void)
{
	List	   *dboids = NIL;
	ListCell   *lc;
	RegistryScan scan;
	SharedBuffer *buffer;

	registry_begin_scan(&scan);
	while ((buffer = registry_next(&scan)) != NULL)
		dboids = list_append_unique_oid(dboids, buffer->key.dboid);
	registry_end_scan(&scan);

	StartTransactionCommand();
	foreach(lc, dboids)
		if (!SearchSysCacheExists1(DATABASEOID, ObjectIdGetDatum(lfirst_oid(lc))))
		remove_database(lfirst_oid(lc));
	CommitTransactionCommand();
}

/*
 * Can a worker be started for a buffer, as far as the shared catalogs tell?
 *
 * Only in the database can it be seen whether the owner that we know of is
 * the owner still, and whether the relation is there: a session without the
 * library tells nobody.  So where no worker can be the owner, one is sent as
 * the bootstrap superuser to have a look.
 */
static bool
check_catalogs(Candidate *candidate)
{
	HeapTuple	tuple;
	bool		can_login;

	StartTransactionCommand();
	if (!SearchSysCacheExists1(DATABASEOID,
							   ObjectIdGetDatum(candidate->key.dboid)))
	{
		CommitTransactionCommand();
		remove_database(candidate->key.dboid);
		return false;
	}

	tuple = SearchSysCache1(AUTHOID, ObjectIdGetDatum(candidate->owner));
	if (!HeapTupleIsValid(tuple))
	{
		start_failed(&candidate->key, _("The role that owns the buffer does not exist."));
		candidate->owner = InvalidOid;
	}
	else
	{
		can_login = ((Form_pg_authid) GETSTRUCT(tuple))->rolcanlogin;
		ReleaseSysCache(tuple);
		if (COMPAT_OWNER_NEEDS_LOGIN && !can_login)
		{
			start_failed(&candidate->key, _("The role that owns the buffer does not have the LOGIN privilege."));
			candidate->owner = InvalidOid;
		}
	}
	CommitTransactionCommand();
	return true;
}

/* Start a worker.  Returns false when the postmaster has no room for it. */
static bool
start_worker(Candidate *candidate)
{
	WorkerArgument argument = {
		candidate->key.dboid, candidate->key.relid, candidate->owner
	};
	BackgroundWorker worker;
	BackgroundWorkerHandle *handle;
	MemoryContext oldcontext;
	SharedBuffer *buffer;
	StartedWorker *entry;
	bool		registered;

	memset(&worker, 0, sizeof(worker));
	worker.bgw_flags = BGWORKER_SHMEM_ACCESS |
		BGWORKER_BACKEND_DATABASE_CONNECTION | COMPAT_WORKER_INTERRUPTIBLE;
	worker.bgw_start_time = BgWorkerStart_RecoveryFinished;
	worker.bgw_restart_time = BGW_NEVER_RESTART;
	strlcpy(worker.bgw_library_name, "statbuffer", BGW_MAXLEN);
	strlcpy(worker.bgw_function_name, "statbuffer_worker_main", BGW_MAXLEN);
	snprintf(worker.bgw_name, BGW_MAXLEN,
			 "statbuffer worker for buffer %u of database %u",
			 candidate->key.relid, candidate->key.dboid);
	strlcpy(worker.bgw_type, "statbuffer worker", BGW_MAXLEN);
	worker.bgw_notify_pid = MyProcPid;
	StaticAssertStmt(sizeof(argument) <= BGW_EXTRALEN,
					 "worker argument must fit");
	memcpy(worker.bgw_extra, &argument, sizeof(argument));

	/* so that it is known if it does not get as far as claiming the buffer */
	buffer = registry_lock(&candidate->key);
	if (buffer == NULL)
		return true;
	registry_set_connected(buffer, false);
	registry_unlock(buffer);

	oldcontext = MemoryContextSwitchTo(TopMemoryContext);
	registered = RegisterDynamicBackgroundWorker(&worker, &handle);
	if (registered)
	{
		entry = palloc(sizeof(StartedWorker));
		entry->key = candidate->key;
		entry->handle = handle;
		started = lappend(started, entry);
	}
	MemoryContextSwitchTo(oldcontext);
	return registered;
}

/*
 * Memory is short: have buffers flush what they hold, due or not, and free
 * the keys.  Those that take less than half of the average are left alone,
 * so that many small ones need not have workers.  Returns when to look again.
 */
static ClockTime
relieve_buffers(void)
{
	static ClockTime again = 0;
	uint64		total = pg_atomic_read_u64(&shared_control->memory.nbytes);
	uint64		nbuffers = 0;
	RegistryScan scan;
	SharedBuffer *buffer;
	ClockTime	now = clock_now();

	if (pg_atomic_read_u32(&shared_control->memory.short_of_memory) == 0 &&
		!table_memory_is_short())
		return SCHEDULE_NEVER;
	if (now < again)
		return again;
	pg_atomic_write_u32(&shared_control->memory.short_of_memory, 0);

	registry_begin_scan(&scan);
	while ((buffer = registry_next(&scan)) != NULL)
		if (table_nkeys(&buffer->table) > 0)
			nbuffers++;
	registry_end_scan(&scan);

	registry_begin_scan(&scan);
	while ((buffer = registry_next(&scan)) != NULL)
	{
		uint64		nbytes = pg_atomic_read_u64(&buffer->table.nbytes);

		if (nbytes == 0 || nbytes < total / Max(nbuffers, 1) / 2)
			continue;
		registry_ask(buffer, REQUEST_FLUSH_EARLY);
	}
	registry_end_scan(&scan);
	return again = clock_add(now, RELIEVE_AGAIN_MSECS);
}

static int
compare_candidates(const void *a, const void *b)
{
	ClockTime	due_a = ((const Candidate *) a)->due;
	ClockTime	due_b = ((const Candidate *) b)->due;

	return due_a < due_b ? -1 : (due_a > due_b ? 1 : 0);
}

/*
 * Tell the log that flushes wait for slots, if that isn't known, and lasts:
 * workers that are idle make way in a moment.  To be called whenever the number
 * of those that wait is known.  Returns when to call it again if it is still
 * the same.
 */
static ClockTime
report_full(int nwaiting, bool postmaster)
{
	static ClockTime waiting_since = 0;
	static ClockTime last_logged = 0;
	ClockTime	now = clock_now();
	ClockTime	report_at;

	if (nwaiting == 0)
	{
		waiting_since = 0;
		return SCHEDULE_NEVER;
	}

	if (waiting_since == 0)
		waiting_since = now;

	report_at = waiting_since;
	if (!postmaster)
		report_at = clock_add(report_at, LOG_FULL_MSECS);
	if (last_logged != 0)
		report_at = Max(report_at, clock_add(last_logged, LOG_AGAIN_MSECS));
	if (now < report_at)
		return report_at;

	last_logged = now;
	if (postmaster)
		ereport(LOG,
				(errcode(ERRCODE_CONFIGURATION_LIMIT_EXCEEDED),
				 errmsg("no slot for a statbuffer worker"),
				 errdetail_plural("The server's background worker slots are in use; %d buffer with due keys waits.",
								  "The server's background worker slots are in use; %d buffers with due keys wait.",
								  nwaiting, nwaiting),
				 errhint("You might need to increase max_worker_processes.")));
	else
		ereport(LOG,
				(errcode(ERRCODE_CONFIGURATION_LIMIT_EXCEEDED),
				 errmsg("all statbuffer workers are in use"),
				 errdetail_plural("%d buffer with due keys waits; the workers take turns.",
								  "%d buffers with due keys wait; the workers take turns.",
								  nwaiting, nwaiting),
				 errhint("You might need to increase statbuffer.max_workers.")));
	return clock_add(now, LOG_AGAIN_MSECS);
}

/* Look through the registry for buffers that need a worker. */
static Candidate *
find_candidates(int *ncandidates, int *nworkers)
{
	RegistryScan scan;
	SharedBuffer *buffer;
	int			size = 64;
	Candidate  *candidates = palloc(size * sizeof(Candidate));
	int			n = 0;

	*nworkers = 0;
	registry_begin_scan(&scan);
	while ((buffer = registry_next(&scan)) != NULL)
	{
		Candidate  *candidate;

		if (buffer->slot.pid != 0 || is_starting(&buffer->key))
		{
			(*nworkers)++;
			continue;
		}
		if (!registry_wants_worker(buffer) &&
			buffer->schedule.reap_at == SCHEDULE_NEVER)
			continue;

		if (n == size)
			candidates = repalloc(candidates,
								  (size *= 2) * sizeof(Candidate));
		candidate = &candidates[n++];
		candidate->key = buffer->key;
		candidate->owner = pg_atomic_read_u32(&buffer->settings.owner);

		/*
		 * Who has just had a slot comes after those that wait since before;
		 * whoever asks for something is due now.
		 */
		candidate->due = (ClockTime) pg_atomic_read_u64(&buffer->schedule.wake_at);
		if (buffer->schedule.reap_at != SCHEDULE_NEVER)
			candidate->due = Min(candidate->due,
								 clock_add(buffer->schedule.reap_at, LAUNCHER_LEAD_MSECS));
		if (registry_wants_worker(buffer) &&
			requests_are_open(&buffer->requests))
			candidate->due = 0;
		candidate->due = Max(candidate->due, buffer->slot.left_at);
		candidate->not_before = Max(buffer->slot.start_after,
									ddl_evicted_until(buffer->key.dboid));
		candidate->due = Max(candidate->due, candidate->not_before);
	}
	registry_end_scan(&scan);

	qsort(candidates, n, sizeof(Candidate), compare_candidates);
	*ncandidates = n;
	return candidates;
}

/*
 * Start the workers that are needed and possible.  Returns when to look
 * again if nothing happens before.  While saved counts are still to be loaded
 * workers take turns, because that takes a buffer without one.
 */
static ClockTime
start_workers(bool loading)
{
	ClockTime	next = SCHEDULE_NEVER;
	Candidate  *candidates;
	int			ncandidates;
	int			nworkers;
	int			nwaiting = 0;
	bool		full = false;
	ClockTime	now;

	check_started();
	candidates = find_candidates(&ncandidates, &nworkers);
	now = clock_now();

	for (int i = 0; i < ncandidates; i++)
	{
		Candidate  *candidate = &candidates[i];
		ClockTime	start_at;

		start_at = candidate->due - LAUNCHER_LEAD_MSECS * INT64CONST(1000);
		start_at = Max(start_at, candidate->not_before);
		if (start_at > now)
		{
			next = Min(next, start_at);
			continue;
		}

		if (nworkers < statbuffer_max_workers && now >= register_after)
		{
			if (!check_catalogs(candidate))
			{
				next = Min(next, retry_time(1));
				continue;
			}
			if (start_worker(candidate))
			{
				register_failures = 0;
				nworkers++;
				continue;
			}
			register_failures++;
			register_after = retry_time(register_failures);
			full = true;
		}

		/* those that are due wait; the others have time until they are */
		if (candidate->due <= now)
			nwaiting++;
		else
			next = Min(next, candidate->due);
		if (register_after > now)
			next = Min(next, register_after);
	}
	pfree(candidates);

	pg_atomic_write_u32(&shared_control->waiting, nwaiting + loading);
	next = Min(next, report_full(nwaiting, full || register_after > now));
	if (nwaiting > 0 || loading)
		registry_wake_workers(InvalidOid);
	return next;
}

/*
 * The launcher was told to end.  When the server stops, it saves what is held,
 * and does.  When it alone was told, it is replaced by another one first, so
 * that there is no time at which nobody would save: the server may be stopped
 * before the postmaster starts it again.  Returns when that is not possible.
 */
static void
end_or_hand_over(void)
{
	bool		offered = false;

	for (;;)
	{
		ResetLatch(MyLatch);

		/* before looking: the postmaster writes first and signals then */
		ShutdownRequestPending = false;
		pg_memory_barrier();
		if (shutdown_is_server())
			break;
		if (!offered)
		{
			(void) launcher_slot_offer(true);
			if (!launch_successor())
			{
				if (!launcher_slot_offer(false))
					proc_exit(0);
				ereport(LOG,
						(errcode(ERRCODE_CONFIGURATION_LIMIT_EXCEEDED),
						 errmsg("the statbuffer launcher was told to end, but stays"),
						 errdetail("There is no background worker slot for another one.")));
				return;
			}
			offered = true;
		}
		else if (!launcher_slot_offer(true))
			proc_exit(0);
		CHECK_FOR_INTERRUPTS();

		/* looks again by itself: a shutdown would wait for us for ever */
		(void) WaitLatch(MyLatch,
						 WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
						 HAND_OVER_LOOK_MSECS,
						 compat_wait_event("StatbufferLauncherMain"));
	}

	if (launcher_slot_offer(false))
		shutdown_save();
	proc_exit(0);
}

/*
 * One turn of the main loop.  Returns when to look again if nothing happens
 * before.
 */
static ClockTime
look_around(void)
{
	static LoadProgress progress = LOAD_BLOCKED;	/* to begin with, try */
	static ClockTime load_at = 0;
	ClockTime	now = clock_now();
	ClockTime	next = relieve_buffers();

	/* where the registry is empty, nothing else would */
	shmem_unmap_freed();
	if (progress == LOAD_BLOCKED ||
		(progress == LOAD_FAILED && now >= load_at))
	{
		progress = load_continue();
		if (progress == LOAD_FINISHED)
			remove_gone_databases();
		load_at = clock_add(now, LOAD_RETRY_MSECS);
	}
	next = Min(next, start_workers(progress != LOAD_FINISHED));
	return progress == LOAD_FINISHED ? next : Min(next, load_at);
}

/* In PG_CATCH: tell the error, and go on as if it had not been. */
static void
recover_from_error(void)
{
	HOLD_INTERRUPTS();
	EmitErrorReport();
	FlushErrorState();
	AbortCurrentTransaction();
	LWLockReleaseAll();
	ConditionVariableCancelSleep();
	registry_release_all(1);
	RESUME_INTERRUPTS();
}

void
statbuffer_launcher_main(Datum main_arg)
{
	MemoryContext context;

	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, SignalHandlerForShutdownRequest);
	pqsignal(SIGINT, PG_SIG_IGN);	/* there is nothing to cancel */
	BackgroundWorkerUnblockSignals();

	/* started again, it would come to the same end */
	if (!shmem_open(LOG))
		proc_exit(0);
	registry_attach(true);
	if (!launcher_slot_claim())
	{
		/* there is one: this one is not needed, nor to be restarted */
		proc_exit(0);
	}
	before_shmem_exit(launcher_exit, (Datum) 0);

	BackgroundWorkerInitializeConnection(NULL, NULL, 0);
	pgstat_report_activity(STATE_IDLE, NULL);

	context = AllocSetContextCreate(TopMemoryContext, "statbuffer launcher",
									ALLOCSET_DEFAULT_SIZES);
	shmem_set_limit();
	for (;;)
	{
		ClockTime volatile next = SCHEDULE_NEVER;
		long		timeout = -1;
		int			events = WL_LATCH_SET | WL_EXIT_ON_PM_DEATH;

		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
		if (ShutdownRequestPending)
			end_or_hand_over();
		if (ConfigReloadPending)
		{
			ConfigReloadPending = false;
			ProcessConfigFile(PGC_SIGHUP);
			shmem_set_limit();
		}

		/* without a launcher nobody would save what is held */
		MemoryContextSwitchTo(context);
		PG_TRY();
		{
			next = look_around();
		}
		PG_CATCH();
		{
			recover_from_error();
			next = retry_time(1);
		}
		PG_END_TRY();
		MemoryContextSwitchTo(context);
		MemoryContextReset(context);

		if (next != SCHEDULE_NEVER)
		{
			timeout = clock_get_timeout(next, clock_now());
			events |= WL_TIMEOUT;
		}
		(void) WaitLatch(MyLatch, events, timeout,
						 compat_wait_event("StatbufferLauncherMain"));
	}
}
