/*-------------------------------------------------------------------------
 *
 * worker.c
 *	  The process that flushes a busy buffer.
 *
 * A worker is connected to the buffer's database as the buffer's owner.  It
 * waits until keys are due and flushes them, again and again.  It leaves if
 * there is nothing to do for a while, if other buffers wait for its slot, and
 * if it is terminated.
 *
 * flush.c does a single flush, and handles failures.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "batch.h"
#include "buffer.h"
#include "compat.h"
#include "ddl.h"
#include "flush.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "session.h"
#include "shutdown.h"
#include "storage/ipc.h"
#include "storage/lmgr.h"
#include "storage/procsignal.h"
#include "utils/backend_status.h"
#include "utils/guc.h"
#include "utils/syscache.h"
#include "worker.h"

/* after this long, a worker gives its slot to a buffer that waits */
#define TURN_MSECS				1000

/* reaping should scan no more than this many keys for each that it may free */
#define REAP_EFFORT				64
#define REAP_MIN_MSECS			100

/* from this many shapes on, look for unused ones, at most this often */
#define MANY_SHAPES				(TABLE_SHAPES / 2)
#define SHAPES_MSECS			100
#define SHAPES_EFFORT			50

/* a table that has held this many keys is replaced once it is empty */
#define BIG_TABLE				1024

/* The state of a worker, besides that of its flushes. */
typedef struct WorkerState
{
	FlushState	flush;
	ClockTime	started;
	ClockTime	last_work;		/* when something was last flushed */
	ClockTime	turn_began;		/* when it began to flush; 0: not yet */
	bool		announced;		/* wake_at says when to start the next one */
	uint64		drain_seen;		/* the last drain ticket noticed */

	/* memory */
	bool		short_of_memory;	/* free keys as soon as they are idle */
	ClockTime	last_reap;		/* when idle keys were reaped */
	uint64		most_keys;		/* maximum number of keys in the table */
	ClockTime	shapes_at;		/* do not look for unused shapes before this */
} WorkerState;

static ClockTime next_reap(WorkerState *worker);

/* ------------------------------------------------------------------------
 * Coming and going
 * ------------------------------------------------------------------------
 */

/*
 * before_shmem_exit callback.  It is registered before the one that rolls back
 * the transaction in progress, so it runs after that, when the batch has been
 * restored.
 */
static void
worker_exit(int code, Datum arg)
{
	WorkerState *worker = (WorkerState *) DatumGetPointer(arg);
	SharedBuffer *shared = worker->flush.shared;

	LWLockReleaseAll();
	flush_end(&worker->flush);
	if (shared != NULL)
	{
		SharedSchedule *schedule = &shared->schedule;

		requests_set_locked_out(&shared->requests, false);
		schedule->reap_at = SCHEDULE_NEVER;
		if (schedule->nidle > 0 && worker->flush.buffer != NULL)
			schedule->reap_at = next_reap(worker);
		if (!worker->announced)
		{
			schedule_leave(schedule);
			if (registry_wants_worker(shared))
				schedule_set_awake(schedule);
		}
	}
	registry_release_all(code);
	worker->flush.shared = NULL;
}

/*
 * Remove other buffers of this database that were dropped by sessions without
 * the library.  This looks at all buffers, so the launcher says when.
 */
static void
remove_dropped_buffers(void)
{
	List	   *relids = NIL;
	ListCell   *lc;
	RegistryScan scan;
	SharedBuffer *other;
	bool		removed = false;

	session_begin_transaction(false);
	registry_begin_scan(&scan);
	while ((other = registry_next(&scan)) != NULL)
		if (other->key.dboid == MyDatabaseId && other->slot.pid == 0)
			relids = lappend_oid(relids, other->key.relid);
	registry_end_scan(&scan);

	foreach(lc, relids)
	{
		Oid			relid = lfirst_oid(lc);

		/* a session that is just creating it has locked it */
		if (SearchSysCacheExists1(RELOID, ObjectIdGetDatum(relid)) ||
			!ConditionalLockRelationOid(relid, AccessExclusiveLock) ||
			SearchSysCacheExists1(RELOID, ObjectIdGetDatum(relid)))
			continue;
		other = registry_claim(MyDatabaseId, relid);
		if (other != NULL)
		{
			registry_drop(other, false);
			removed = true;
		}
	}
	session_commit_transaction();
	if (removed)
		launcher_slot_wake();
}

/*
 * Flush due keys, until `stop_at'.  Returns false if there is no point in
 * continuing: the time is up, the buffer itself fails, or it is no longer
 * ours.
 */
static bool
flush_due(FlushState *flush, ClockTime stop_at)
{
	ClockTime	now = clock_now();

	while (now < stop_at && schedule_has_due(&flush->shared->schedule))
	{
		flush_batch(flush, now);
		if (flush->leaving || flush->shared == NULL ||
			flush->shared->flush.breakdowns > 0)
			return false;
		now = clock_now();

		/* after a conflict with others, they must have time to go on */
		if (flush->paused_until > now)
		{
			(void) WaitLatch(MyLatch, WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
							 clock_get_timeout(Min(flush->paused_until, stop_at), now),
							 compat_wait_event("StatbufferShutdown"));
			now = clock_now();
		}
	}
	return now < stop_at;
}

/*
 * The server stops: flush everything, including what sessions still publish
 * while they are being terminated, until the time is up.
 */
static void
last_flush(WorkerState *worker)
{
	FlushState *flush = &worker->flush;
	bool		was_alone = false;
	ClockTime	stop_at;

	/* the definition was not read yet */
	if (flush->buffer == NULL)
		flush_check_definition(flush);
	if (flush->buffer == NULL || flush->shared == NULL ||
		session_shutdown_msecs() == 0)
		return;
	stop_at = session_stop_at(clock_now());
	for (;;)
	{
		ClockTime	now = clock_now();

		/* a session that is gone has published everything it had */
		bool		alone = shutdown_count_sessions(MyDatabaseId) == 0;

		/* keys that fail are tried only once, after all others are stored */
		(void) requests_take(&flush->shared->requests);
		requests_serve(&flush->shared->requests, &flush->shared->schedule, now);
		schedule_advance(&flush->shared->schedule, now);
		schedule_make_all_due(&flush->shared->schedule, was_alone, now);
		if (!flush_due(flush, stop_at) || was_alone)
			return;

		was_alone = alone;
		if (!alone)
		{
			(void) WaitLatch(MyLatch,
							 WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
							 10L, compat_wait_event("StatbufferShutdown"));
			ResetLatch(MyLatch);
		}
	}
}

/* ------------------------------------------------------------------------
 * Memory
 * ------------------------------------------------------------------------
 */

/* The buffer's option "timeout", in microseconds. */
static int64
get_timeout(WorkerState *worker)
{
	return (int64) worker->flush.buffer->options.timeout * 1000;
}

/* Get the time to reap idle keys next, or SCHEDULE_NEVER if there are none. */
static ClockTime
next_reap(WorkerState *worker)
{
	SharedBuffer *shared = worker->flush.shared;
	uint64		nidle = shared->schedule.nidle;
	int64		pause;
	double		effort;

	if (nidle == 0)
		return SCHEDULE_NEVER;

	/*
	 * Reaping scans all keys that are held.  So wait until enough of them are
	 * idle to make it worthwhile.
	 */
	effort = (double) table_nkeys(&shared->table) /
		((double) REAP_EFFORT * nidle);
	pause = Max(get_timeout(worker) / 4, REAP_MIN_MSECS * 1000);
	if (effort > 1)
		pause = Min((double) pause * effort * 4, 3600.0 * USECS_PER_SEC);
	return Max(shared->schedule.oldest_idle + get_timeout(worker),
			   worker->last_reap + pause);
}

/* Free the keys that have been idle since `idle_before'. */
static void
reap(WorkerState *worker, ClockTime now, ClockTime idle_before)
{
	SharedBuffer *shared = worker->flush.shared;

	worker->most_keys = Max(worker->most_keys, table_nkeys(&shared->table));
	batch_reap(shared, &worker->flush.buffer->table, idle_before);
	worker->last_reap = now;
}

/*
 * There was nothing to do for a while: free the memory of idle keys, and
 * replace the table if it is empty and was big.
 */
static void
give_memory_back(WorkerState *worker, ClockTime now)
{
	FlushState *flush = &worker->flush;
	SharedTable *table = &flush->shared->table;

	reap(worker, now, now - get_timeout(worker));
	if (worker->most_keys < BIG_TABLE || table_nkeys(table) != 0)
		return;

	session_begin_transaction(false);
	if (ConditionalLockRelationOid(flush->relid, AccessExclusiveLock) &&
		SearchSysCacheExists1(RELOID, ObjectIdGetDatum(flush->relid)) &&
		table_nkeys(table) == 0 &&
		flush->buffer->table.number == table->number)
	{
		table_replace(table);
		buffer_attach_worker(buffer_open(flush->relid, NoLock));
		worker->most_keys = 0;
	}
	session_commit_transaction();
}

/*
 * Remove shapes without keys, to make room for others, if no session uses the
 * buffer at the moment.  This must scan all keys.
 */
static void
remove_unused_shapes(WorkerState *worker, ClockTime now)
{
	SharedBuffer *shared = worker->flush.shared;

	if (now < worker->shapes_at ||
		table_count_shapes(&shared->table) < MANY_SHAPES)
		return;
	worker->shapes_at = clock_add(now, SHAPES_MSECS);
	session_begin_transaction(false);
	if (ConditionalLockRelationOid(worker->flush.relid, AccessExclusiveLock))
	{
		batch_remove_shapes(shared, now);

		/* if that did not help, limit the share of our time that it takes */
		if (table_count_shapes(&shared->table) >= MANY_SHAPES)
			worker->shapes_at += SHAPES_EFFORT * (clock_now() - now);
	}
	session_commit_transaction();
}

/*
 * Memory is short: free idle keys, even if there are few of them.  While
 * `more' keys are still to be flushed, do it only if a quarter of them are
 * idle, because it scans all keys.
 */
static void
free_idle(WorkerState *worker, ClockTime now, bool more)
{
	SharedBuffer *shared = worker->flush.shared;

	if (shared->schedule.nidle > (more ? table_nkeys(&shared->table) / 4 : 0))
		reap(worker, now, now);
	worker->short_of_memory = more;
}

/* ------------------------------------------------------------------------
 * The main loop
 * ------------------------------------------------------------------------
 */

/* Must the worker end?  If the server stops, does the last flush. */
static bool
must_end(WorkerState *worker)
{
	if (ConfigReloadPending)
	{
		ConfigReloadPending = false;
		ProcessConfigFile(PGC_SIGHUP);
	}
	if (ShutdownRequestPending)
	{
		if (shutdown_is_server())
			last_flush(worker);
		return true;
	}
	return ddl_evicted_until(MyDatabaseId) != 0;
}

/*
 * Carry out requests, and advance the schedule.  A request is a reason to
 * retry a buffer that fails.
 */
static void
serve_requests(WorkerState *worker, ClockTime now)
{
	FlushState *flush = &worker->flush;
	SharedRequests *requests = &flush->shared->requests;
	SharedSchedule *schedule = &flush->shared->schedule;
	uint64		drain = pg_atomic_read_u64(&requests->drain.asked);
	bool		recheck = requests_are_new(requests, REQUEST_RECHECK);
	uint32		asked = requests_take(requests);

	if (recheck || (flush->unread && now >= flush->paused_until))
	{
		flush->paused_until = 0;
		flush_check_definition(flush);

		/* not before: a worker that is terminated meanwhile has not looked */
		if (flush->shared != NULL && !flush->unread)
			requests_done(requests, REQUEST_RECHECK);
		if (flush->leaving)
			return;
	}
	if ((asked & REQUEST_FLUSH_ALL) || drain != worker->drain_seen ||
		DsaPointerIsValid(pg_atomic_read_u64(&requests->flushes)))
		flush->paused_until = 0;
	worker->drain_seen = drain;

	requests_serve(requests, schedule, now);
	schedule_advance(schedule, now);
	if (asked & REQUEST_FLUSH_EARLY)
	{
		schedule_make_all_due(schedule, false, now);
		requests_done(requests, REQUEST_FLUSH_EARLY);
		worker->short_of_memory = true;
	}
}

/* May the worker leave, given that no key is due before `next'? */
static bool
may_leave(WorkerState *worker, ClockTime now, ClockTime next)
{
	FlushState *flush = &worker->flush;

	/*
	 * Other buffers wait for the slot: they get it if nothing is due soon, or
	 * after a minimum time.
	 */
	if (pg_atomic_read_u32(&shared_control->waiting) > 0)
		return next > clock_add(now, TURN_MSECS) ||
			clock_passed(worker->started, now, TURN_MSECS);

	/* a buffer that fails needs no worker during a long pause */
	if (flush->paused_until > now || flush->unread)
		return flush->paused_until > clock_add(now, LAUNCHER_LEAD_MSECS);
	Assert(flush->buffer != NULL);
	return now >= clock_add(worker->last_work, flush->buffer->options.timeout) &&
		(next == SCHEDULE_NEVER ||
		 next > clock_add(now, LAUNCHER_LEAD_MSECS));
}

/*
 * Prepare to leave.  Returns false if something has come up meanwhile.  The
 * next key is due at `next'.
 */
static bool
try_to_leave(WorkerState *worker, ClockTime now, ClockTime next)
{
	FlushState *flush = &worker->flush;
	SharedSchedule *schedule = &flush->shared->schedule;

	if (flush->buffer != NULL && flush->paused_until <= now &&
		pg_atomic_read_u32(&shared_control->waiting) == 0)
	{
		/* we may not have been notified that it was dropped */
		flush_check_definition(flush);
		if (flush->leaving || flush->paused_until > now ||
			schedule_next(schedule) != next)
			return false;
		give_memory_back(worker, now);
	}
	if (flush->paused_until > now)
		registry_start_after(flush->shared, flush->paused_until);
	worker->announced = schedule_sleep_until(schedule, next, next);
	return worker->announced;
}

/*
 * Sleep until `next', when the first key is due, or until it is time to reap
 * idle keys or to leave.
 *
 * If the buffer pauses although keys are due (`due'), or because its definition
 * could not be read, new keys do not wake us: they are sorted in after the
 * pause.  Requests do.
 */
static void
sleep_until(WorkerState *worker, ClockTime now, ClockTime next, bool due)
{
	FlushState *flush = &worker->flush;
	ClockTime	wake_at = next;
	long		timeout = -1;
	int			events = WL_LATCH_SET | WL_EXIT_ON_PM_DEATH;

	if (flush->buffer != NULL)
	{
		ClockTime	quiet = clock_add(worker->last_work,
									  flush->buffer->options.timeout);

		wake_at = Min(wake_at, next_reap(worker));
		if (quiet > now)
			wake_at = Min(wake_at, quiet);
	}
	if (!due && !flush->unread &&
		!schedule_sleep_until(&flush->shared->schedule, next, wake_at))
		return;
	if (wake_at != SCHEDULE_NEVER)
	{
		timeout = clock_get_timeout(wake_at, now);
		events |= WL_TIMEOUT;
	}
	pgstat_report_stat(true);
	(void) WaitLatch(MyLatch, events, timeout,
					 compat_wait_event("StatbufferWorkerMain"));
}

/* One iteration of the main loop.  Returns false if the worker leaves. */
static bool
take_turn(WorkerState *worker)
{
	FlushState *flush = &worker->flush;
	ClockTime	now = clock_now();
	ClockTime	next;
	bool		due;

	schedule_set_awake(&flush->shared->schedule);
	remove_unused_shapes(worker, now);
	serve_requests(worker, now);
	if (flush->leaving)
		return false;

	next = schedule_next(&flush->shared->schedule);
	due = next == 0;
	if (worker->short_of_memory && flush->buffer != NULL)
		free_idle(worker, now, due && now >= flush->paused_until);
	if (due && now >= flush->paused_until)
	{
		if (worker->turn_began == 0)
			worker->turn_began = now;
		flush_batch(flush, now);
		worker->last_work = clock_now();

		/* other buffers wait, and this one has had its time */
		if (pg_atomic_read_u32(&shared_control->waiting) > 0 &&
			clock_passed(worker->turn_began, worker->last_work, TURN_MSECS))
			return false;
		return !flush->leaving;
	}
	if (due || flush->unread)
		next = flush->paused_until;

	if (flush->buffer != NULL && next_reap(worker) <= now)
		reap(worker, now, now - get_timeout(worker));
	if (may_leave(worker, now, next))
		return !try_to_leave(worker, now, next) && !flush->leaving;
	sleep_until(worker, now, next, due);
	return true;
}

/* The main function of a worker process.  Its argument is a WorkerArgument. */
void
statbuffer_worker_main(Datum main_arg)
{
	static WorkerState worker;
	WorkerArgument argument;
	SharedBuffer *shared;

	memcpy(&argument, MyBgworkerEntry->bgw_extra, sizeof(argument));

	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, SignalHandlerForShutdownRequest);
	BackgroundWorkerUnblockSignals();

	if (!shmem_open(LOG) || !registry_attach(false))
		proc_exit(0);
	shutdown_register_exit();
	shared = registry_claim(argument.dboid, argument.relid);
	if (shared == NULL)
		proc_exit(0);
	before_shmem_exit(worker_exit, PointerGetDatum(&worker));
	flush_begin(&worker.flush, shared);

	BackgroundWorkerInitializeConnectionByOid(argument.dboid, argument.owner,
											  COMPAT_WORKER_FLAGS);
	if (OidIsValid(argument.owner))
		registry_start_succeeded(shared);
	registry_set_connected(shared, true);

	flush_set_connected(&worker.flush);
	worker.started = worker.last_work = clock_now();
	worker.drain_seen = pg_atomic_read_u64(&shared->requests.drain.asked);
	if (argument.look_for_dropped)
		remove_dropped_buffers();

	do
	{
		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
	} while (!must_end(&worker) && take_turn(&worker));
	flush_log_discarded(&worker.flush, true);

	/* a stopped buffer needs no memory for idle keys */
	shared = worker.flush.shared;
	if (shared != NULL && worker.flush.buffer != NULL &&
		shared->schedule.nidle > 0)
	{
		ClockTime	now = clock_now();

		reap(&worker, now, registry_is_stopped(shared) ? now :
			 now - get_timeout(&worker));
	}
	proc_exit(0);
}
