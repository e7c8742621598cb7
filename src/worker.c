/*-------------------------------------------------------------------------
 *
 * worker.c
 *	  The process that flushes busy buffers.
 *
 * A worker is connected to the buffer's database as the buffer's owner.  It
 * waits until keys are due and flushes them, again and again.  It leaves if
 * there is nothing to do for a while, if other buffers wait for its slot, and
 * if it is terminated.  If a buffer waits that it can serve, because it has the
 * same owner and is in the same database, it passes on to that one: see
 * make_way().
 *
 * flush.c does a single flush, and handles failures.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "batch.h"
#include "buffer.h"
#include "compat.h"
#include "ddl.h"
#include "flush.h"
#include "miscadmin.h"
#include "move.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "queue.h"
#include "session.h"
#include "settings.h"
#include "shutdown.h"
#include "storage/ipc.h"
#include "storage/lmgr.h"
#include "storage/procsignal.h"
#include "utils/backend_status.h"
#include "utils/guc.h"
#include "utils/ps_status.h"
#include "utils/syscache.h"
#include "worker.h"

/*
 * After this long, or after so many other buffers, a worker gives its slot to the
 * buffer that has waited longest, even if that takes another process.
 */
#define TURN_MSECS				1000
#define TURN_BUFFERS			100

/*
 * While other buffers wait that the worker can serve, it does not wait longer
 * than this for a key to be due
 */
#define IDLE_MSECS				20

/*
 * After this long, a worker passes on no more: the next process has the present
 * settings of the role and the database, and empty caches.
 */
#define PROCESS_MSECS			60000

/*
 * If the library is not preloaded, there are sessions that do not know us and
 * cannot ask workers to leave a database that they need alone.  PostgreSQL waits
 * five seconds for other processes to leave it.  So a worker looks after this
 * time whether the database is wanted, and stays no longer without work.
 */
#define STRANGER_MSECS			1000

/* reaping should scan no more than this many keys for each that it may free */
#define REAP_EFFORT				64
#define REAP_MIN_MSECS			100

/* from this many shapes on, look for unused ones, at most this often */
#define MANY_SHAPES				(TABLE_SHAPES / 2)
#define SHAPES_MSECS			100
#define SHAPES_EFFORT			50

/* dropped buffers with more keys than this take a worker of their own */
#define REMOVE_KEYS				10000

/* a table that has held this many keys is replaced once it is empty */
#define BIG_TABLE				1024

/* The state of a worker, besides that of its flushes. */
typedef struct WorkerState
{
	FlushState	flush;
	Oid			owner;			/* whose buffers it can serve */
	ClockTime	connected_at;
	ClockTime	looked_at;		/* when it last looked whether its database is
								 * wanted */
	ClockTime	turn_began;		/* when it was last for the buffer to be
								 * served that had waited longest */
	int			overtakers;		/* buffers that were served since, before
								 * others that had waited longer */

	/* what follows is about the present buffer */
	ClockTime	started;
	ClockTime	last_work;		/* when something was last flushed */
	ClockTime	first_flush;	/* when it began to flush; 0: not yet */
	bool		announced;		/* wake_at says when to start the next one */
	uint64		drain_seen;		/* the last drain ticket noticed */

	/* memory */
	bool		short_of_memory;	/* free keys as soon as they are idle */
	ClockTime	last_reap;		/* when idle keys were reaped */
	uint64		most_keys;		/* maximum number of keys in the table */
	ClockTime	shapes_at;		/* do not look for unused shapes before this */
	MoveState	move;
} WorkerState;

static ClockTime next_reap(WorkerState *worker);

/* ------------------------------------------------------------------------
 * Coming and going
 * ------------------------------------------------------------------------
 */

/* Begin with a buffer that was claimed, and to which `flush' is bound. */
static void
begin_buffer(WorkerState *worker)
{
	SharedBuffer *shared = worker->flush.shared;

	worker->started = worker->last_work = clock_now();
	worker->first_flush = 0;
	worker->announced = false;
	worker->drain_seen = pg_atomic_read_u64(&shared->requests.drain.asked);
	worker->short_of_memory = false;
	worker->last_reap = 0;
	worker->most_keys = 0;
	worker->shapes_at = 0;
	memset(&worker->move, 0, sizeof(MoveState));
}

/*
 * Announce what is to come in the buffer that the worker leaves.  Requests that
 * it has taken and not carried out stay where they are, for the next worker.
 * The caller releases the buffer afterwards, which wakes the launcher.  Takes no
 * lock, cannot fail.
 */
static void
leave_buffer(WorkerState *worker)
{
	SharedBuffer *shared = worker->flush.shared;
	SharedSchedule *schedule = &shared->schedule;

	Assert(worker->flush.batch.nitems == 0);
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

/*
 * before_shmem_exit callback.  It is registered before the one that rolls back
 * the transaction in progress, so it runs after that, when the batch has been
 * restored.
 */
static void
worker_exit(int code, Datum arg)
{
	WorkerState *worker = (WorkerState *) DatumGetPointer(arg);

	LWLockReleaseAll();
	flush_end(&worker->flush);
	if (worker->flush.shared != NULL)
		leave_buffer(worker);
	registry_release_all(code);
	worker->flush.shared = NULL;
}

/*
 * The buffer's relation is gone: remove the buffer.  That can take long, so the
 * rest is left to the next worker if this one must end, or if other buffers
 * wait and have waited for a turn.
 */
static void
remove_buffer(WorkerState *worker)
{
	FlushState *flush = &worker->flush;
	ClockTime	began = clock_now();

	session_end();
	do
	{
		CHECK_FOR_INTERRUPTS();
		if (ShutdownRequestPending || ddl_evicted_until(MyDatabaseId) != 0 ||
			(queue_is_waited_for() &&
			 clock_passed(began, clock_now(), TURN_MSECS)))
			return;
	} while (!registry_continue_drop(flush->shared));
	flush->shared = NULL;
}

/*
 * Remove other buffers of this database that were dropped by sessions without
 * the library, or if they have many keys, leave it to a worker of their own.
 * This looks at all buffers, so the launcher says when.
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
		if (other == NULL)
			continue;
		registry_begin_drop(other, false);
		if (table_nkeys(&other->table) > REMOVE_KEYS)
		{
			registry_release(other, 0);
			continue;
		}
		while (!registry_continue_drop(other))
			;
		removed = true;
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
 * The server stops: flush everything that the buffer has, including what
 * sessions still publish while they are being terminated, until the time is up.
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
		schedule_make_all_due(&flush->shared->schedule, was_alone);
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

/*
 * If the buffer pauses, it needs no other worker before the pause is over.  But
 * who has just made a request for which it is retried at once has told us, and
 * we leave.
 */
static void
start_after_pause(WorkerState *worker)
{
	FlushState *flush = &worker->flush;
	SharedRequests *requests = &flush->shared->requests;

	if (flush->paused_until <= clock_now())
		return;
	registry_start_after(flush->shared, flush->paused_until);
	pg_memory_barrier();
	if (requests_are_new(requests, REQUEST_RECHECK | REQUEST_FLUSH_ALL) ||
		pg_atomic_read_u64(&requests->drain.asked) != worker->drain_seen ||
		DsaPointerIsValid(pg_atomic_read_u64(&requests->flushes)))
		registry_start_after(flush->shared, 0);
}

/*
 * What is left to do in a buffer that the worker leaves in good order, because
 * it ends (`ending') or passes on.
 */
static void
tidy_buffer(WorkerState *worker, bool ending)
{
	SharedBuffer *shared = worker->flush.shared;
	ClockTime	idle_before = clock_now();

	flush_log_discarded(&worker->flush, ending);
	if (shared == NULL || worker->flush.buffer == NULL ||
		shared->schedule.nidle == 0)
		return;

	/* a stopped buffer needs no memory for idle keys */
	if (!registry_is_stopped(shared))
		idle_before -= get_timeout(worker);
	if (shared->schedule.oldest_idle <= idle_before)
		reap(worker, clock_now(), idle_before);
}

/*
 * Pass on to another buffer, which was claimed.  The process is the worker of
 * both for a moment, so that it always is the worker of one.
 *
 * Nothing of the present buffer is left: there is no transaction, the batch is
 * empty, and the session is as flush_batch() has reset it.
 */
static void
pass_on(WorkerState *worker, SharedBuffer *other)
{
	FlushState *flush = &worker->flush;
	SharedBuffer *shared = flush->shared;
	char		title[64];

	Assert(!IsTransactionState());
	tidy_buffer(worker, false);
	start_after_pause(worker);

	/* from here on nothing fails */
	leave_buffer(worker);
	flush_begin(flush, other);
	begin_buffer(worker);
	registry_release(shared, 0);
	registry_start_succeeded(other);

	snprintf(title, sizeof(title), "now for buffer %u", flush->relid);
	set_ps_display(title);
	pgstat_report_activity(STATE_IDLE, "");
}

/*
 * Find a buffer that waits, and that the worker can serve, and pass on to it.
 * If there is none, returns the advice of queue_ask().
 */
static QueueAdvice
find_next(WorkerState *worker, bool may_overtake, bool may_leave)
{
	bool		overtakes;
	SharedBufferKey key;
	SharedBuffer *other;
	QueueAdvice advice;

	for (;;)
	{
		advice = queue_ask(worker->owner, may_overtake, may_leave,
						   &key, &overtakes);
		if (advice != QUEUE_TAKE)
			return advice;

		/* it may be gone, or have got a worker */
		other = registry_claim(key.dboid, key.relid);
		if (other != NULL)
			break;
	}
	pass_on(worker, other);
	if (overtakes)
		worker->overtakers++;
	else
	{
		worker->turn_began = worker->started;
		worker->overtakers = 0;
	}
	return QUEUE_TAKE;
}

/*
 * Other buffers wait.  If this one can do without a worker, because its time is
 * up or no key is due before `next', which is a while off, make way for them.
 * Returns QUEUE_STAY if not.
 *
 * It is always the turn of the buffer that has waited longest.  But to start a
 * process takes longer than a flush, so in the second that is a buffer's turn,
 * its worker also serves others of the same owner.  Then it goes on only if the
 * one that has waited longest is among those.
 */
static QueueAdvice
make_way(WorkerState *worker, ClockTime now, ClockTime next)
{
	FlushState *flush = &worker->flush;
	SharedSchedule *schedule = &flush->shared->schedule;
	bool		turn_is_over = worker->overtakers >= TURN_BUFFERS ||
	clock_passed(worker->turn_began, now, TURN_MSECS);
	bool		may_leave = turn_is_over || next > clock_add(now, TURN_MSECS);
	QueueAdvice advice;

	if (!may_leave && next <= clock_add(now, IDLE_MSECS))
		return QUEUE_STAY;
	if (may_leave && clock_passed(worker->connected_at, now, PROCESS_MSECS))
		worker->owner = InvalidOid;

	/* if nothing is due, say when the next worker must come */
	if (next > now)
	{
		if (!schedule_sleep_until(schedule, next, next))
			return QUEUE_STAY;
		worker->announced = true;
	}
	advice = find_next(worker, !turn_is_over, may_leave);
	if (advice == QUEUE_STAY)
	{
		worker->announced = false;
		schedule_set_awake(schedule);
	}
	else if (advice == QUEUE_LEAVE)
		start_after_pause(worker);
	return advice;
}

/*
 * Does another session need the database alone?  Looks no more often than
 * STRANGER_MSECS.
 */
static bool
database_is_wanted(WorkerState *worker)
{
	if (statbuffer_preloaded ||
		!clock_limit(&worker->looked_at, clock_now(), STRANGER_MSECS) ||
		!ddl_database_is_wanted())
		return false;

	/* another worker would only wait for that lock */
	registry_start_after(worker->flush.shared,
						 clock_add(clock_now(), STRANGER_MSECS));
	return true;
}

/*
 * Must the worker end?  If the server stops, flushes for the last time: its
 * buffer, and then those that wait and that it can serve.
 */
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
		{
			do
			{
				last_flush(worker);
			} while (!worker->flush.leaving && worker->flush.shared != NULL &&
					 find_next(worker, true, false) == QUEUE_TAKE);
		}
		return true;
	}
	return ddl_evicted_until(MyDatabaseId) != 0 || database_is_wanted(worker);
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
		schedule_make_all_due(schedule, false);
		requests_done(requests, REQUEST_FLUSH_EARLY);
		worker->short_of_memory = true;
	}
}

/*
 * How long the worker stays without work, in milliseconds: for the buffer's
 * "timeout", or less for the reason given at STRANGER_MSECS.
 */
static int
idle_limit(const WorkerState *worker)
{
	int			timeout = worker->flush.buffer->options.timeout;

	return statbuffer_preloaded ? timeout : Min(timeout, STRANGER_MSECS);
}

/* May the worker leave, given that no key is due before `next'? */
static bool
may_leave(WorkerState *worker, ClockTime now, ClockTime next)
{
	FlushState *flush = &worker->flush;

	/* a buffer that fails needs no worker during a long pause */
	if (flush->paused_until > now || flush->unread)
		return flush->paused_until > clock_add(now, LAUNCHER_LEAD_MSECS);
	Assert(flush->buffer != NULL);
	return now >= clock_add(worker->last_work, idle_limit(worker)) &&
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

	if (flush->buffer != NULL && flush->paused_until <= now)
	{
		/* we may not have been notified that it was dropped */
		flush_check_definition(flush);
		if (flush->leaving || flush->paused_until > now ||
			schedule_next(schedule) != next)
			return false;
		give_memory_back(worker, now);
	}
	start_after_pause(worker);
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
	ClockTime	wake_at = Min(next, move_next(&worker->move, flush->shared));
	long		timeout = -1;
	int			events = WL_LATCH_SET | WL_EXIT_ON_PM_DEATH;

	if (flush->buffer != NULL)
	{
		ClockTime	quiet = clock_add(worker->last_work, idle_limit(worker));

		wake_at = Min(wake_at, next_reap(worker));
		if (quiet > now)
			wake_at = Min(wake_at, quiet);
	}
	if (!due && !flush->unread &&
		!schedule_sleep_until(&flush->shared->schedule, next, wake_at))
		return;
	if (!statbuffer_preloaded)
		wake_at = Min(wake_at, clock_add(now, STRANGER_MSECS));
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
	QueueAdvice advice = QUEUE_STAY;

	schedule_set_awake(&flush->shared->schedule);
	space_detach_removed();
	if (registry_is_dropped(flush->shared))
		return false;
	Assert(flush->batch.nitems == 0);
	if (move_next(&worker->move, flush->shared) <= now)
		move_portion(&worker->move, flush->shared);
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
		if (worker->first_flush == 0)
			worker->first_flush = now;
		flush_batch(flush, now);
		worker->last_work = clock_now();
		if (flush->leaving)
			return false;

		/* other buffers wait, and this one has had its time */
		if (queue_is_waited_for() &&
			clock_passed(worker->first_flush, worker->last_work, TURN_MSECS))
			advice = make_way(worker, worker->last_work, 0);
		return advice != QUEUE_LEAVE;
	}
	if (due || flush->unread)
		next = flush->paused_until;

	if (flush->buffer != NULL && next_reap(worker) <= now)
		reap(worker, now, now - get_timeout(worker));
	if (queue_is_waited_for())
		advice = make_way(worker, now, next);
	if (advice != QUEUE_STAY)
		return advice == QUEUE_TAKE;
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
	worker.owner = argument.owner;
	before_shmem_exit(worker_exit, PointerGetDatum(&worker));
	flush_begin(&worker.flush, shared);

	BackgroundWorkerInitializeConnectionByOid(argument.dboid, argument.owner,
											  COMPAT_WORKER_FLAGS);
	if (OidIsValid(argument.owner))
		registry_start_succeeded(shared);
	registry_set_connected(shared, true);

	flush_set_connected(&worker.flush);
	begin_buffer(&worker);
	worker.connected_at = worker.turn_began = worker.started;
	if (argument.look_for_dropped)
		remove_dropped_buffers();

	do
	{
		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
	} while (!must_end(&worker) && take_turn(&worker));
	if (registry_is_dropped(worker.flush.shared))
		remove_buffer(&worker);
	tidy_buffer(&worker, true);
	proc_exit(0);
}
