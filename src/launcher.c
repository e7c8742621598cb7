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
#include "counters.h"
#include "launcher.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "saved.h"
#include "shared.h"
#include "statbuffer.h"
#include "stopping.h"
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

#define LAUNCHER_RESTART_SECS	1

/* after a worker that didn't come up, or a full table of the postmaster's */
#define START_RETRY_MSECS		1000
#define START_RETRY_MAX_MSECS	60000

/* what lasts is told in the log so often */
#define LOG_AGAIN_MSECS			600000

/* when there are some for so long, they don't just wait for an idle worker */
#define LOG_FULL_MSECS			3000

/* how long DROP DATABASE and the like keep workers out, at the most */
#define EVICTION_MSECS			60000
#define EVICTION_WAIT_MSECS		5000

/* how long who wants to see counts waits for saved ones to be loaded */
#define LOAD_WAIT_MSECS			10000

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
 * Have the launcher start with the server.  Not for pg_upgrade: it has taken
 * down where the old server's transactions end before it starts it, so none of
 * them must write.  What is saved stays where it is.
 */
void
launcher_register(void)
{
	BackgroundWorker worker;

	if (IsBinaryUpgrade)
		return;
	fill_launcher(&worker);
	RegisterBackgroundWorker(&worker);
}

/*
 * See to it that there is a launcher.  When there can't be, that is told to
 * the log and flushes wait; the next transaction that counts tries again.
 */
void
launcher_ensure(void)
{
	BackgroundWorker worker;
	BackgroundWorkerHandle *handle;
	MemoryContext oldcontext;

	/* who counts sees to it, too, that counts are saved without one */
	stopping_stand_by();
	if (likely(!shared_needs_launcher()))
		return;

	fill_launcher(&worker);
	oldcontext = MemoryContextSwitchTo(TopMemoryContext);
	if (RegisterDynamicBackgroundWorker(&worker, &handle))
		stopping_expect_launcher(handle);
	else
		ereport(LOG,
				(errcode(ERRCODE_CONFIGURATION_LIMIT_EXCEEDED),
				 errmsg("could not register the statbuffer launcher"),
				 errdetail("Counts are kept, but nothing is flushed."),
				 errhint("You might need to increase max_worker_processes.")));
	MemoryContextSwitchTo(oldcontext);
}

/*
 * See to it that what the last shutdown saved is in memory, before somebody
 * looks at counts.  Waits for the launcher to load it; returns false, after a
 * warning, when that takes too long.
 */
bool
launcher_await_saved(void)
{
	static bool warned = false;
	ClockTime	until = 0;
	bool		loaded;

	if (shared_control == NULL)
		shared_attach(false);
	if (likely(!saved_is_pending()))
		return true;

	/* a standby has no launcher, and no counts */
	if (RecoveryInProgress())
		return false;
	shared_attach(true);
	launcher_ensure();

	ConditionVariablePrepareToSleep(&shared_control->saved_cv);
	while (!(loaded = !saved_is_pending()))
	{
		ClockTime	now = clock_now();

		if (until == 0)
			until = clock_add(now, warned ? 0 : LOAD_WAIT_MSECS);
		if (now >= until)
			break;
		(void) ConditionVariableTimedSleep(&shared_control->saved_cv,
										   (until - now) / 1000 + 1,
										   compat_wait_event("StatbufferLoad"));
	}
	ConditionVariableCancelSleep();
	if (!loaded && !warned)
	{
		warned = true;
		ereport(WARNING,
				(errmsg("counts that were saved when the server was stopped are not loaded yet"),
				 errhint("They are not lost; the server log may tell what they wait for.")));
	}
	return loaded;
}

/* Wake the workers of a database, or InvalidOid: all workers. */
static void
tell_workers(Oid dboid)
{
	dshash_seq_status status;
	SharedBuffer *buffer;

	dshash_seq_init(&status, shared_registry, false);
	while ((buffer = dshash_seq_next(&status)) != NULL)
	{
		Latch	   *latch = *(Latch *volatile *) &buffer->worker_latch;

		if (latch != NULL &&
			(!OidIsValid(dboid) || buffer->key.dboid == dboid))
			SetLatch(latch);
	}
	dshash_seq_term(&status);
}

/* Is there a worker in the database? */
static bool
has_workers(Oid dboid)
{
	dshash_seq_status status;
	SharedBuffer *buffer;
	bool		found = false;

	dshash_seq_init(&status, shared_registry, false);
	while (!found && (buffer = dshash_seq_next(&status)) != NULL)
		found = buffer->key.dboid == dboid && buffer->worker_pid != 0;
	dshash_seq_term(&status);
	return found;
}

/*
 * Ask the workers of a database to leave, and to keep out until
 * launcher_admit() is called.  If `wait', waits until they are gone, but not
 * for long: a handler may be at work.
 */
void
launcher_evict(Oid dboid, bool wait)
{
	ClockTime	start = clock_now();

	if (!shared_open(DEBUG1) || !shared_attach(false))
		return;

	shared_evict_database(dboid, clock_add(start, EVICTION_MSECS));
	tell_workers(dboid);
	while (wait && has_workers(dboid) &&
		   !clock_passed(start, clock_now(), EVICTION_WAIT_MSECS))
	{
		(void) WaitLatch(MyLatch,
						 WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
						 10L, compat_wait_event("StatbufferEviction"));
		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
	}
}

/* Let workers into the database again. */
void
launcher_admit(Oid dboid)
{
	dshash_seq_status status;
	SharedBuffer *buffer;

	if (!shared_open(DEBUG1) || !shared_attach(false))
		return;
	shared_evict_database(dboid, 0);

	/* that also has the launcher find out whether it is gone */
	dshash_seq_init(&status, shared_registry, false);
	while ((buffer = dshash_seq_next(&status)) != NULL)
		if (buffer->key.dboid == dboid)
			pg_atomic_write_u32(&buffer->recheck, 1);
	dshash_seq_term(&status);
	shared_wake_launcher();
}

/* ------------------------------------------------------------------------
 * The launcher
 * ------------------------------------------------------------------------
 */

static void
launcher_exit(int code, Datum arg)
{
	LWLockReleaseAll();
	shared_release_claims(code);
	pg_atomic_write_u32(&shared_control->waiting, 0);
	shared_release_launcher();
}

/*
 * When to try again after so many failures in a row.
 */
static ClockTime
retry_time(int failures)
{
	int64		msecs = START_RETRY_MSECS;

	for (int i = 1; i < failures && msecs < START_RETRY_MAX_MSECS; i++)
		msecs *= 2;
	return clock_add(clock_now(), Min(msecs, START_RETRY_MAX_MSECS));
}

/* A worker could not be started, or did not come up. */
static void
start_failed(const SharedBufferKey *key, const char *message)
{
	SharedBuffer *buffer = dshash_find(shared_registry, key, false);

	if (buffer == NULL)
		return;
	buffer->start_failures++;
	buffer->start_after = retry_time(buffer->start_failures);
	shared_set_error(buffer, message, true);
	dshash_release_lock(shared_registry, buffer);
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

		buffer = dshash_find(shared_registry, &worker->key, false);
		if (buffer != NULL)
		{
			failed = buffer->worker_pid == 0 && !buffer->worker_connected;
			dshash_release_lock(shared_registry, buffer);
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
		dshash_seq_status status;
		SharedBuffer *buffer;
		SharedBufferKey key = {InvalidOid, InvalidOid};

		dshash_seq_init(&status, shared_registry, false);
		while ((buffer = dshash_seq_next(&status)) != NULL)
			if (buffer->key.dboid == dboid && buffer->worker_pid == 0)
				key = buffer->key;
		dshash_seq_term(&status);

		if (!OidIsValid(key.dboid))
			break;
		buffer = shared_claim_worker(key.dboid, key.relid);
		if (buffer != NULL)
			counters_drop_buffer(buffer, true);
	}
}

/* Free what belongs to databases that were dropped while nobody looked. */
static void
remove_gone_databases(void)
{
	List	   *dboids = NIL;
	ListCell   *lc;
	dshash_seq_status status;
	SharedBuffer *buffer;

	dshash_seq_init(&status, shared_registry, false);
	while ((buffer = dshash_seq_next(&status)) != NULL)
		dboids = list_append_unique_oid(dboids, buffer->key.dboid);
	dshash_seq_term(&status);

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
	buffer = dshash_find(shared_registry, &candidate->key, false);
	if (buffer == NULL)
		return true;
	buffer->worker_connected = false;
	dshash_release_lock(shared_registry, buffer);

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
	uint64		total = pg_atomic_read_u64(&shared_control->nbytes);
	uint64		nbuffers = 0;
	dshash_seq_status status;
	SharedBuffer *buffer;
	ClockTime	now = clock_now();

	if (pg_atomic_read_u32(&shared_control->crowded) == 0 &&
		!counters_are_crowded())
		return SCHEDULE_NEVER;
	if (now < again)
		return again;
	pg_atomic_write_u32(&shared_control->crowded, 0);

	dshash_seq_init(&status, shared_registry, false);
	while ((buffer = dshash_seq_next(&status)) != NULL)
		if (pg_atomic_read_u64(&buffer->nkeys) > 0)
			nbuffers++;
	dshash_seq_term(&status);

	dshash_seq_init(&status, shared_registry, false);
	while ((buffer = dshash_seq_next(&status)) != NULL)
	{
		Latch	   *latch = *(Latch *volatile *) &buffer->worker_latch;
		uint64		nbytes = pg_atomic_read_u64(&buffer->nbytes);

		if (nbytes == 0 || nbytes < total / Max(nbuffers, 1) / 2)
			continue;
		pg_atomic_write_u32(&buffer->relieve, 1);
		if (latch != NULL)
			SetLatch(latch);
	}
	dshash_seq_term(&status);
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
	dshash_seq_status status;
	SharedBuffer *buffer;
	int			size = 64;
	Candidate  *candidates = palloc(size * sizeof(Candidate));
	int			n = 0;

	*nworkers = 0;
	dshash_seq_init(&status, shared_registry, false);
	while ((buffer = dshash_seq_next(&status)) != NULL)
	{
		Candidate  *candidate;

		if (buffer->worker_pid != 0 || is_starting(&buffer->key))
		{
			(*nworkers)++;
			continue;
		}
		if (!schedule_has_work(buffer) && buffer->reap_at == SCHEDULE_NEVER)
			continue;

		if (n == size)
			candidates = repalloc(candidates,
								  (size *= 2) * sizeof(Candidate));
		candidate = &candidates[n++];
		candidate->key = buffer->key;
		candidate->owner = pg_atomic_read_u32(&buffer->owner);

		/*
		 * Who has just had a slot comes after those that wait since before;
		 * whoever asks for something is due now.
		 */
		candidate->due = (ClockTime) pg_atomic_read_u64(&buffer->schedule.wake_at);
		if (buffer->reap_at != SCHEDULE_NEVER)
			candidate->due = Min(candidate->due,
								 clock_add(buffer->reap_at, LAUNCHER_LEAD_MSECS));
		if (schedule_has_requests(buffer))
			candidate->due = 0;
		candidate->due = Max(candidate->due, buffer->left_at);
		candidate->not_before = Max(buffer->start_after,
									shared_evicted_until(buffer->key.dboid));
		candidate->due = Max(candidate->due, candidate->not_before);
	}
	dshash_seq_term(&status);

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
		tell_workers(InvalidOid);
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
	BackgroundWorker worker;
	bool		offered = false;

	for (;;)
	{
		ResetLatch(MyLatch);

		/* before looking: the postmaster writes first and signals then */
		ShutdownRequestPending = false;
		pg_memory_barrier();
		if (stopping_server())
			break;
		if (!offered)
		{
			fill_launcher(&worker);
			(void) shared_offer_launcher(true);
			if (!RegisterDynamicBackgroundWorker(&worker, NULL))
			{
				if (!shared_offer_launcher(false))
					proc_exit(0);
				ereport(LOG,
						(errcode(ERRCODE_CONFIGURATION_LIMIT_EXCEEDED),
						 errmsg("the statbuffer launcher was told to end, but stays"),
						 errdetail("There is no background worker slot for another one.")));
				return;
			}
			offered = true;
		}
		else if (!shared_offer_launcher(true))
			proc_exit(0);
		CHECK_FOR_INTERRUPTS();

		/* looks again by itself: a shutdown would wait for us for ever */
		(void) WaitLatch(MyLatch,
						 WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
						 HAND_OVER_LOOK_MSECS,
						 compat_wait_event("StatbufferLauncherMain"));
	}

	if (shared_offer_launcher(false))
		stopping_save();
	proc_exit(0);
}

/*
 * One turn of the main loop.  Returns when to look again if nothing happens
 * before.
 */
static ClockTime
look_around(void)
{
	static SavedProgress progress = SAVED_BLOCKED;	/* to begin with, try */
	static ClockTime load_at = 0;
	ClockTime	now = clock_now();
	ClockTime	next = relieve_buffers();

	/* where the registry is empty, nothing else would */
	shared_unmap_freed();
	if (progress == SAVED_BLOCKED ||
		(progress == SAVED_FAILED && now >= load_at))
	{
		progress = saved_load();
		if (progress == SAVED_LOADED)
			remove_gone_databases();
		load_at = clock_add(now, LOAD_RETRY_MSECS);
	}
	next = Min(next, start_workers(progress != SAVED_LOADED));
	return progress == SAVED_LOADED ? next : Min(next, load_at);
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
	shared_release_claims(1);
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
	if (!shared_open(LOG))
		proc_exit(0);
	shared_attach(true);
	if (!shared_claim_launcher())
	{
		/* there is one: this one is not needed, nor to be restarted */
		proc_exit(0);
	}
	before_shmem_exit(launcher_exit, (Datum) 0);

	BackgroundWorkerInitializeConnection(NULL, NULL, 0);
	pgstat_report_activity(STATE_IDLE, NULL);

	context = AllocSetContextCreate(TopMemoryContext, "statbuffer launcher",
									ALLOCSET_DEFAULT_SIZES);
	shared_set_limit();
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
			shared_set_limit();
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
			int64		usecs = next - clock_now();

			timeout = Min((usecs + 999) / 1000, 3600 * 1000);
			timeout = Max(timeout, 0);
			events |= WL_TIMEOUT;
		}
		(void) WaitLatch(MyLatch, events, timeout,
						 compat_wait_event("StatbufferLauncherMain"));
	}
}
