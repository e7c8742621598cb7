/*-------------------------------------------------------------------------
 *
 * worker.c
 *	  The process that flushes a busy buffer.
 *
 * A worker is connected to the buffer's database as the buffer's owner.  It
 * waits until keys are due and has them flushed, again and again.  It leaves
 * when there is nothing to do for a while, when others wait for its slot, and
 * when it is told to.
 *
 * What one flush is, and what becomes of failures, is told in flush.c.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "batch.h"
#include "buffer.h"
#include "compat.h"
#include "flush.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "stopping.h"
#include "storage/ipc.h"
#include "storage/lmgr.h"
#include "storage/procsignal.h"
#include "utils/backend_status.h"
#include "utils/guc.h"
#include "utils/syscache.h"
#include "worker.h"

/* a slot can be taken from a worker that had it so long */
#define TURN_MSECS				1000

/* reaping looks at no more than so many keys for each that it may free */
#define REAP_EFFORT				64
#define REAP_MIN_MSECS			100

/* with this many shapes we look for unused ones, this often at most */
#define MANY_SHAPES				(SHARED_SHAPES / 2)
#define SHAPES_MSECS			100
#define SHAPES_EFFORT			50

/* a table that held so many keys is given back when it is empty */
#define BIG_TABLE				1024

static ClockTime started;
static bool schedule_told = false;	/* wake_at is right for who comes next */

/* when idle keys were reaped, and the most keys that the table has had */
static ClockTime last_reap = 0;
static uint64 most_keys = 0;

static ClockTime next_reap(void);

/* ------------------------------------------------------------------------
 * Coming and going
 * ------------------------------------------------------------------------
 */

/*
 * However the process ends: registered before the one that rolls back the
 * transaction in progress, so that it runs after it, when the batch has been
 * given back.
 */
static void
worker_exit(int code, Datum arg)
{
	LWLockReleaseAll();
	flush_end();
	if (worker.shared != NULL)
	{
		pg_atomic_write_u32(&worker.shared->locked_out, 0);
		worker.shared->reap_at = SCHEDULE_NEVER;
		if (worker.shared->nidle > 0 && worker.buffer != NULL)
			worker.shared->reap_at = next_reap();
		if (!schedule_told)
			schedule_leave(worker.shared);
	}
	shared_release_claims(code);
	worker.shared = NULL;
}

/*
 * Other buffers of this database that have no worker may have been dropped by
 * sessions that don't know of us.  Free what is left of them.
 */
static void
remove_dropped_buffers(void)
{
	List	   *relids = NIL;
	ListCell   *lc;
	dshash_seq_status status;
	SharedBuffer *other;
	bool		removed = false;

	flush_begin_transaction();
	dshash_seq_init(&status, shared_registry, false);
	while ((other = dshash_seq_next(&status)) != NULL)
		if (other->key.dboid == MyDatabaseId && other->worker_pid == 0)
			relids = lappend_oid(relids, other->key.relid);
	dshash_seq_term(&status);

	foreach(lc, relids)
	{
		Oid			other_relid = lfirst_oid(lc);

		/* whoever makes one just now has it locked */
		if (SearchSysCacheExists1(RELOID, ObjectIdGetDatum(other_relid)) ||
			!ConditionalLockRelationOid(other_relid, AccessExclusiveLock) ||
			SearchSysCacheExists1(RELOID, ObjectIdGetDatum(other_relid)))
			continue;
		other = shared_claim_worker(MyDatabaseId, other_relid);
		if (other != NULL)
		{
			counters_drop_buffer(other, false);
			removed = true;
		}
	}
	flush_commit_transaction();
	if (removed)
		shared_wake_launcher();
}

/*
 * The server stops: flush what there is, and what sessions that are just
 * being terminated still publish, until the time is up.
 */
static void
last_flush(void)
{
	ClockTime	now = clock_now();
	bool		was_alone = false;

	/* it had no time to look at it */
	if (worker.buffer == NULL)
		flush_check_definition();
	if (worker.buffer == NULL || worker.shared == NULL || flush_shutdown_msecs() == 0)
		return;
	if (worker.stop_at == 0)
		worker.stop_at = clock_add(now, flush_shutdown_msecs());
	for (;;)
	{
		/* who isn't there any more has published */
		bool		alone = stopping_sessions(MyDatabaseId) == 0;

		/* keys that fail have their turn when all others are stored */
		batch_serve_requests(worker.shared, now);
		schedule_advance(worker.shared, now);
		schedule_make_all_due(worker.shared, was_alone, now);
		while (now < worker.stop_at &&
			   DsaPointerIsValid(worker.shared->schedule.due_head))
		{
			flush_batch(now);
			now = clock_now();

			/* not a key but the buffer itself fails */
			if (worker.leaving || worker.shared == NULL || worker.shared->breakdowns > 0)
				return;
		}
		if (was_alone || now >= worker.stop_at)
			return;

		was_alone = alone;
		if (!alone)
		{
			(void) WaitLatch(MyLatch,
							 WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
							 10L, compat_wait_event("StatbufferShutdown"));
			ResetLatch(MyLatch);
		}
		now = clock_now();
	}
}

/* ------------------------------------------------------------------------
 * Reaping
 * ------------------------------------------------------------------------
 */

/* When idle keys are to be reaped next; SCHEDULE_NEVER when there are none. */
static ClockTime
next_reap(void)
{
	int64		timeout = (int64) worker.buffer->options.timeout * 1000;
	int64		pause;
	double		effort;

	if (worker.shared->nidle == 0)
		return SCHEDULE_NEVER;

	/*
	 * Reaping looks at every key that is held.  So it waits until enough are
	 * idle to be worth it, in proportion.
	 */
	effort = (double) pg_atomic_read_u64(&worker.shared->nkeys) /
		((double) REAP_EFFORT * worker.shared->nidle);
	pause = Max(timeout / 4, REAP_MIN_MSECS * 1000);
	if (effort > 1)
		pause = Min((double) pause * effort * 4, 3600.0 * USECS_PER_SEC);
	return Max(worker.shared->oldest_idle + timeout, last_reap + pause);
}

static void
reap(ClockTime now, ClockTime idle_before)
{
	most_keys = Max(most_keys, pg_atomic_read_u64(&worker.shared->nkeys));
	counters_reap(worker.shared, &worker.buffer->table, idle_before);
	last_reap = now;
}

/*
 * Nothing was to be done for a while: give back the memory of idle keys, and
 * that of the table when it is empty and was big.
 */
static void
give_memory_back(ClockTime now)
{
	reap(now, now - (int64) worker.buffer->options.timeout * 1000);
	if (most_keys < BIG_TABLE || pg_atomic_read_u64(&worker.shared->nkeys) != 0)
		return;

	flush_begin_transaction();
	if (ConditionalLockRelationOid(worker.relid, AccessExclusiveLock) &&
		pg_atomic_read_u64(&worker.shared->nkeys) == 0 &&
		worker.buffer->table.number == worker.shared->table_number)
	{
		counters_replace_table(worker.shared);
		buffer_attach_worker(buffer_open(worker.relid, NoLock));
		most_keys = 0;
	}
	flush_commit_transaction();
}

/*
 * Shapes whose keys have been flushed make room for others, when nobody uses
 * the buffer at the moment.  To look for them takes a look at every key.
 */
static void
remove_unused_shapes(ClockTime now)
{
	static ClockTime retry_at = 0;

	if (now < retry_at ||
		shared_count_shapes(worker.shared) < MANY_SHAPES)
		return;
	retry_at = clock_add(now, SHAPES_MSECS);
	flush_begin_transaction();
	if (ConditionalLockRelationOid(worker.relid, AccessExclusiveLock))
	{
		counters_remove_shapes(worker.shared, now);

		/* if that was for nothing, it must not take much of our time */
		if (shared_count_shapes(worker.shared) >= MANY_SHAPES)
			retry_at += SHAPES_EFFORT * (clock_now() - now);
	}
	flush_commit_transaction();
}

/*
 * Memory is short: free what is idle, whether it is worth the effort by
 * itself or not.  While there is more to come, looking at every key that is
 * held has to be worth it.  Returns whether there is.
 */
static bool
relieve(ClockTime now, bool more)
{
	if (worker.shared->nidle > (more ? pg_atomic_read_u64(&worker.shared->nkeys) / 4 : 0))
		reap(now, now);
	return more;
}

/* ------------------------------------------------------------------------
 * The main loop
 * ------------------------------------------------------------------------
 */

/* Is it time to leave, seeing that no key is due before `next'? */
static bool
may_leave(ClockTime now, ClockTime last_work, ClockTime next)
{
	/* somebody waits for the slot: let him have it, after a turn */
	if (pg_atomic_read_u32(&shared_control->waiting) > 0)
		return next > clock_add(now, TURN_MSECS) ||
			clock_passed(started, now, TURN_MSECS);

	/* a broken buffer is left alone meanwhile */
	if (worker.paused_until > now || worker.buffer == NULL)
		return worker.paused_until > clock_add(now, LAUNCHER_LEAD_MSECS);
	return now >= clock_add(last_work, worker.buffer->options.timeout) &&
		(next == SCHEDULE_NEVER ||
		 next > clock_add(now, LAUNCHER_LEAD_MSECS));
}

static void
worker_loop(void)
{
	ClockTime	last_work = started;
	uint64		drain_seen = pg_atomic_read_u64(&worker.shared->drain_asked);
	bool		flushed = false;
	bool		relieving = false;

	while (!worker.leaving)
	{
		ClockTime	now;
		ClockTime	next;
		ClockTime	wake_at;
		bool		due;

		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
		if (ConfigReloadPending)
		{
			ConfigReloadPending = false;
			ProcessConfigFile(PGC_SIGHUP);
		}
		if (ShutdownRequestPending)
		{
			if (stopping_server())
				last_flush();
			break;
		}
		if (shared_evicted_until(MyDatabaseId) != 0)
			break;

		now = clock_now();
		schedule_awake(worker.shared);

		remove_unused_shapes(now);

		/* somebody asked for something: that is a reason to try again, too */
		if (pg_atomic_exchange_u32(&worker.shared->recheck, 0) != 0 ||
			(worker.buffer == NULL && now >= worker.paused_until))
		{
			worker.paused_until = 0;
			flush_check_definition();
			if (worker.leaving)
				continue;
		}
		if (pg_atomic_read_u32(&worker.shared->flush_all) != 0 ||
			DsaPointerIsValid(pg_atomic_read_u64(&worker.shared->flush_requests)) ||
			pg_atomic_read_u64(&worker.shared->drain_asked) != drain_seen)
			worker.paused_until = 0;
		drain_seen = pg_atomic_read_u64(&worker.shared->drain_asked);
		batch_serve_requests(worker.shared, now);
		schedule_advance(worker.shared, now);
		if (pg_atomic_exchange_u32(&worker.shared->relieve, 0) != 0)
		{
			schedule_make_all_due(worker.shared, false, now);
			relieving = true;
		}

		next = schedule_next(worker.shared);
		due = next == 0;
		if (relieving && worker.buffer != NULL)
			relieving = relieve(now, due && now >= worker.paused_until);
		if (due && now >= worker.paused_until)
		{
			flush_batch(now);
			last_work = clock_now();

			/* others wait, and this worker has had its turn */
			if (flushed && pg_atomic_read_u32(&shared_control->waiting) > 0 &&
				clock_passed(started, now, TURN_MSECS))
				break;
			flushed = true;
			continue;
		}
		if (due || worker.buffer == NULL)
			next = worker.paused_until;

		if (worker.buffer != NULL && next_reap() <= now)
			reap(now, now - (int64) worker.buffer->options.timeout * 1000);

		if (may_leave(now, last_work, next))
		{
			if (worker.buffer != NULL && worker.paused_until <= now &&
				pg_atomic_read_u32(&shared_control->waiting) == 0)
			{
				/* nobody may have told us that it was dropped */
				flush_check_definition();
				if (worker.leaving || worker.paused_until > now ||
					schedule_next(worker.shared) != next)
					continue;
				give_memory_back(now);
			}
			if (worker.paused_until > now)
				worker.shared->start_after = worker.paused_until;
			schedule_told = schedule_sleep_until(worker.shared, next, next);
			if (schedule_told)
				break;
			continue;
		}

		wake_at = next;
		if (worker.buffer != NULL)
		{
			ClockTime	quiet = clock_add(last_work,
										  worker.buffer->options.timeout);

			wake_at = Min(wake_at, next_reap());
			if (quiet > now)
				wake_at = Min(wake_at, quiet);
			else if (next != SCHEDULE_NEVER && !due)
				wake_at = Min(wake_at, next);
		}

		/*
		 * While it pauses, keys that come due don't wake it: they are let in
		 * when the pause is over.  Requests do.
		 */
		if (due || worker.buffer == NULL || schedule_sleep_until(worker.shared, next, wake_at))
		{
			long		timeout = -1;
			int			events = WL_LATCH_SET | WL_EXIT_ON_PM_DEATH;

			if (wake_at != SCHEDULE_NEVER)
			{
				/* rounded up, and in steps that a long can hold everywhere */
				timeout = Min((wake_at - now + 999) / 1000, 3600 * 1000);
				timeout = Max(timeout, 0);
				events |= WL_TIMEOUT;
			}
			pgstat_report_stat(true);
			(void) WaitLatch(MyLatch, events, timeout,
							 compat_wait_event("StatbufferWorkerMain"));
		}
	}
}

void
statbuffer_worker_main(Datum main_arg)
{
	WorkerArgument argument;
	SharedBuffer *shared;

	memcpy(&argument, MyBgworkerEntry->bgw_extra, sizeof(argument));

	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, SignalHandlerForShutdownRequest);
	BackgroundWorkerUnblockSignals();

	if (!shared_open(LOG) || !shared_attach(false))
		proc_exit(0);
	stopping_stand_by();
	shared = shared_claim_worker(argument.dboid, argument.relid);
	if (shared == NULL)
		proc_exit(0);
	before_shmem_exit(worker_exit, (Datum) 0);
	flush_claimed(shared);

	BackgroundWorkerInitializeConnectionByOid(argument.dboid, argument.owner,
											  COMPAT_WORKER_FLAGS);
	if (OidIsValid(argument.owner))
		worker.shared->start_failures = 0;
	worker.shared->worker_connected = true;

	flush_connected();
	started = clock_now();
	remove_dropped_buffers();

	worker_loop();
	flush_log_discarded(true);

	/* one that was stopped needs no memory for idle keys at all */
	if (worker.shared != NULL && worker.buffer != NULL && worker.shared->nidle > 0)
	{
		ClockTime	now = clock_now();

		reap(now, pg_atomic_read_u32(&worker.shared->parked) != 0 ? now :
			 now - (int64) worker.buffer->options.timeout * 1000);
	}
	proc_exit(0);
}
