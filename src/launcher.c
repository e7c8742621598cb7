/*-------------------------------------------------------------------------
 *
 * launcher.c
 *	  The process that starts workers for buffers that need one.
 *
 * It is connected to no database and sees only the shared catalogs.  It sleeps
 * until a buffer is going to need a worker, or until its latch is set: by a
 * process that schedules a key of a buffer without a worker, or by a worker
 * that leaves.  Then it walks through the registry, and starts workers for the
 * buffers whose keys are due first, up to the limit.  If buffers are left over,
 * it puts them into the queue (queue.c), so that workers pass on to them or make
 * way for them.  Where there are many buffers, and it is woken all the time, it
 * pauses between walks: see WALK_SHARE.
 *
 * It also loads the counts that the last shutdown saved, saves counts at the
 * next one, triggers early flushes when memory runs short, has counters moved
 * when most keys are gone, and starts the keepers of ledgers (keepers.c).
 *
 * If the library is preloaded, the launcher starts with the server; otherwise
 * the first transaction that counts registers it.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/xact.h"
#include "access/xlog.h"
#include "catalog/pg_database.h"
#include "compat.h"
#include "ddl.h"
#include "keepers.h"
#include "launch.h"
#include "launcher.h"
#include "load.h"
#include "miscadmin.h"
#include "move.h"
#include "owner.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "queue.h"
#include "registry.h"
#include "settings.h"
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

/* delay after a worker did not come up, or the postmaster had no slot */
#define START_RETRY_MSECS		1000
#define START_RETRY_MAX_MSECS	60000

/* a lasting condition is logged again after this */
#define LOG_AGAIN_MSECS			600000

/* waiting for less than this is normal: an idle worker takes time to leave */
#define LOG_FULL_MSECS			3000

/* while memory runs short, early flushes are requested this often */
#define EARLY_FLUSH_MSECS		1000

/*
 * while it waits to be replaced, the launcher checks for a shutdown this often
 */
#define HAND_OVER_LOOK_MSECS	1000

/*
 * Buffers of a database that is gone are removed for so long at a time.  After
 * that, the launcher looks for what else there is to do.
 */
#define REMOVE_MSECS			50

/* delay after loading saved counts has failed */
#define LOAD_RETRY_MSECS		1000

/*
 * Before counters are moved because many keys are gone, no more than a few keys
 * must have gone for so long; and moves begin no more often than that.
 */
#define SPARSE_MSECS			2000
#define MOVE_PAUSE_MSECS		10000

/*
 * Counters of buffers without a worker are moved for so long at a time.  The
 * launcher looks whether everything has moved at growing intervals.
 */
#define MOVE_MSECS				20
#define MOVE_LOOK_MIN_MSECS		50
#define MOVE_LOOK_MAX_MSECS		300000

/* then all buffers are looked through again */
#define MOVE_AGAIN_LOOKS		10

/* a launcher that cannot move is not replaced before it has run for so long */
#define MOVE_RUN_MSECS			10000

/*
 * A walk through the registry is followed by a pause that is so many times as
 * long, but no longer than WALK_PAUSE_MSECS.
 */
#define WALK_SHARE				20
#define WALK_PAUSE_MSECS		100

/*
 * A database's workers look for dropped buffers, when they start, no more often
 * than once in so much for each buffer that there is beyond the first hundred.
 */
#define DROPPED_LOOK_MSECS		10
#define DROPPED_LOOK_FREE		100

/* A worker that this process has started and that may still be running. */
typedef struct StartedWorker
{
	SharedBufferKey key;		/* the buffer that it was started for */
	BackgroundWorkerHandle *handle;
	pid_t		pid;			/* 0: not known yet */
	bool		connected;		/* it may have passed on to another buffer */
} StartedWorker;

/* A buffer that needs a worker. */
typedef struct Candidate
{
	SharedBufferKey key;
	Oid			owner;
	ClockTime	due;
	ClockTime	not_before;		/* start no worker before this */
} Candidate;

/* A worker of a database was told, lately, to look for dropped buffers. */
typedef struct DatabaseLook
{
	Oid			dboid;
	ClockTime	looked_at;
} DatabaseLook;

/* The move in progress, as far as this process has a part in it. */
typedef struct Move
{
	uint32		number;			/* space_moving() */
	int			looks;			/* how often it has looked since that */
	ClockTime	look_at;
	List	   *todo;			/* SharedBufferKeys of buffers without a
								 * worker */
	MoveState	state;
} Move;

/* What there is to do, as a walk through the registry has found. */
typedef struct Walk
{
	Candidate  *candidates;		/* by the time when they need a worker */
	int			ncandidates;
	List	   *latches;		/* of processes that have claimed buffers, */
	List	   *pids;			/* and their IDs */
	int			nworkers;		/* workers that there are */
	int			nbuffers;		/* all buffers */
} Walk;

static List *started = NIL;
static List *looks = NIL;
static ClockTime walk_after = 0;
static ClockTime register_after = 0;
static int	register_failures = 0;

/* counters could not be moved, for another reason than that there is no memory */
static bool cannot_move = false;

/* before_shmem_exit callback: cease to be the launcher. */
static void
launcher_exit(int code, Datum arg)
{
	LWLockReleaseAll();
	registry_release_all(code);
	queue_set(NULL, 0, 0, false);
	launcher_slot_release();
}

/* When to try again after this many failures in a row. */
static ClockTime
retry_time(int failures)
{
	return clock_add(clock_now(),
					 clock_double(START_RETRY_MSECS, failures - 1,
								  START_RETRY_MAX_MSECS));
}

/*
 * Record that a worker could not be started, or did not come up, and delay the
 * next attempt.
 */
static void
start_failed(const SharedBufferKey *key, const char *message)
{
	SharedBuffer *buffer = registry_lock(key);
	BufferFailure failure = {.message = message,.broken = true};

	if (buffer == NULL)
		return;
	failure.retry_at = retry_time(registry_start_failed(buffer));
	registry_start_after(buffer, failure.retry_at);
	registry_set_failure(buffer, &failure);
	registry_unlock(buffer);
}

/*
 * Forget workers that have exited.  Record a failure for those that could not
 * connect: the database may not allow connections, or the role may not
 * connect.
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
		BgwHandleStatus status = GetBackgroundWorkerPid(worker->handle, &pid);

		if (status == BGWH_STARTED)
			worker->pid = pid;
		if (!worker->connected &&
			(buffer = registry_lock(&worker->key)) != NULL)
		{
			worker->connected = buffer->slot.connected;
			failed = !worker->connected && buffer->slot.pid == 0;
			registry_unlock(buffer);
		}
		if (status != BGWH_STOPPED)
			continue;
		if (failed)
			start_failed(&worker->key, _("worker process could not connect to the database"));
		pfree(worker->handle);
		pfree(worker);
		started = foreach_delete_current(started, lc);
	}
}

/* Is a worker starting that may not have claimed the buffer yet? */
static bool
is_starting(const SharedBufferKey *key)
{
	ListCell   *lc;

	foreach(lc, started)
	{
		StartedWorker *worker = lfirst(lc);

		if (!worker->connected &&
			worker->key.dboid == key->dboid && worker->key.relid == key->relid)
			return true;
	}
	return false;
}

/*
 * Count the workers that there are: those that this process has started and
 * that have not exited, and others that have claimed buffers.  A worker that is
 * just passing on has claimed two.
 */
static int
count_workers(List *pids)
{
	List	   *known = NIL;
	ListCell   *lc;
	int			nworkers = list_length(started);

	foreach(lc, started)
		known = lappend_int(known, ((StartedWorker *) lfirst(lc))->pid);
	foreach(lc, pids)
	{
		if (list_member_int(known, lfirst_int(lc)))
			continue;
		known = lappend_int(known, lfirst_int(lc));
		nworkers++;
	}
	list_free(known);
	return nworkers;
}

/*
 * Remove the buffers of a database that is gone, for about REMOVE_MSECS.  What is
 * left after that are buffers that want a worker, and so it goes on with the next
 * walk.  Returns whether all are gone.
 */
static bool
remove_database(Oid dboid)
{
	ClockTime	until = clock_add(clock_now(), REMOVE_MSECS);
	List	   *relids = NIL;
	ListCell   *lc;
	RegistryScan scan;
	SharedBuffer *buffer;

	registry_begin_scan(&scan);
	while ((buffer = registry_next(&scan)) != NULL)
		if (buffer->key.dboid == dboid && buffer->slot.pid == 0)
			relids = lappend_oid(relids, buffer->key.relid);
	registry_end_scan(&scan);

	foreach(lc, relids)
	{
		buffer = registry_claim(dboid, lfirst_oid(lc));
		if (buffer == NULL)
			continue;
		registry_begin_drop(buffer, true);
		while (!registry_continue_drop(buffer))
			if (clock_now() >= until)
			{
				registry_release(buffer, 0);
				return false;
			}
	}
	return true;
}

/*
 * Remove the buffers of databases that were dropped while there was no
 * launcher.
 */
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
		(void) remove_database(lfirst_oid(lc));
	CommitTransactionCommand();
}

/*
 * Can a worker be started for a buffer, as far as the shared catalogs tell?
 *
 * Whether the owner that we know is still the owner, and whether the relation
 * still exists, can only be seen in the database: a session without the
 * library does not notify us.  So if no worker could connect as the owner, we
 * start one as the bootstrap superuser, only to check that.
 *
 * If not, sets `again' to the time when to look again.
 */
static bool
check_catalogs(Candidate *candidate, ClockTime *again)
{
	OwnerInfo	owner;

	StartTransactionCommand();
	if (!SearchSysCacheExists1(DATABASEOID,
							   ObjectIdGetDatum(candidate->key.dboid)))
	{
		CommitTransactionCommand();
		*again = clock_now();
		if (remove_database(candidate->key.dboid))
			*again = clock_add(*again, START_RETRY_MSECS);
		return false;
	}

	owner_get_info(candidate->owner, &owner);
	if (!owner.exists || !owner.may_log_in)
	{
		start_failed(&candidate->key, !owner.exists ?
					 _("role that owns the buffer does not exist") :
					 _("role that owns the buffer does not have the LOGIN privilege"));
		candidate->owner = InvalidOid;
	}
	CommitTransactionCommand();
	return true;
}

/*
 * Shall the next worker of a database look for buffers that were dropped by
 * sessions without the library, given that there are so many buffers?  The
 * look takes time in proportion to their number.
 */
static bool
look_for_dropped(Oid dboid, int nbuffers)
{
	int64		pause = (int64) (nbuffers - DROPPED_LOOK_FREE) * DROPPED_LOOK_MSECS;
	ClockTime	now = clock_now();
	MemoryContext oldcontext;
	DatabaseLook *look;
	ListCell   *lc;

	foreach(lc, looks)
	{
		look = lfirst(lc);
		if (!clock_passed(look->looked_at, now, pause))
		{
			if (look->dboid == dboid)
				return false;
			continue;
		}
		looks = foreach_delete_current(looks, lc);
		pfree(look);
	}
	if (pause <= 0)
		return true;

	oldcontext = MemoryContextSwitchTo(TopMemoryContext);
	look = palloc(sizeof(DatabaseLook));
	look->dboid = dboid;
	look->looked_at = now;
	looks = lappend(looks, look);
	MemoryContextSwitchTo(oldcontext);
	return true;
}

/*
 * Start a worker, given that there are so many buffers.  Returns false if the
 * postmaster has no slot for it.
 */
static bool
start_worker(Candidate *candidate, int nbuffers)
{
	WorkerArgument argument = {
		.dboid = candidate->key.dboid,
		.relid = candidate->key.relid,
		.owner = candidate->owner,
		.look_for_dropped = look_for_dropped(candidate->key.dboid, nbuffers)
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

	/* so that check_started() notices if it does not connect */
	buffer = registry_lock(&candidate->key);
	if (buffer == NULL)
		return true;
	if (buffer->slot.pid != 0)
	{
		/* since our walk, another worker has passed on to it */
		registry_unlock(buffer);
		return true;
	}
	registry_set_connected(buffer, false);
	registry_unlock(buffer);

	oldcontext = MemoryContextSwitchTo(TopMemoryContext);
	registered = RegisterDynamicBackgroundWorker(&worker, &handle);
	if (registered)
	{
		entry = palloc(sizeof(StartedWorker));
		entry->key = candidate->key;
		entry->handle = handle;
		entry->pid = 0;
		entry->connected = false;
		started = lappend(started, entry);
	}
	MemoryContextSwitchTo(oldcontext);
	return registered;
}

/*
 * If memory runs short, request early flushes: buffers flush their keys, due
 * or not, and free them.  Buffers that use less than half of the average are
 * skipped, so that many small ones do not all need workers.  Returns when to
 * check again.
 */
static ClockTime
request_early_flushes(void)
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
	return again = clock_add(now, EARLY_FLUSH_MSECS);
}

/* ------------------------------------------------------------------------
 * Moving counters to a new space: see SharedSpaces
 * ------------------------------------------------------------------------
 */

/*
 * If there is much less than there was, begin a move.  Returns when to look
 * again if nothing happens before.
 */
static ClockTime
begin_move(ClockTime now)
{
	static ClockTime since = 0; /* when it was found; 0: it is not sparse */
	static uint64 nbytes_then;
	static ClockTime not_before = 0;
	static int	failures = 0;	/* in a row */
	uint64		nbytes = pg_atomic_read_u64(&shared_control->memory.nbytes);
	ClockTime	begin_at;

	if (!space_is_sparse())
	{
		since = 0;
		return SCHEDULE_NEVER;
	}

	/* what is about to be freed must not be moved */
	if (since == 0 || nbytes < nbytes_then / 8 * 7)
	{
		since = now;
		nbytes_then = nbytes;
	}
	begin_at = Max(clock_add(since, SPARSE_MSECS), not_before);
	if (now < begin_at)
		return begin_at;
	since = 0;

	/* it may fail, for want of memory, which must not fill the log */
	not_before = clock_add(now, clock_double(MOVE_PAUSE_MSECS, failures++,
											 LOG_AGAIN_MSECS));
	space_begin_move();
	failures = 0;
	return now;
}

/*
 * List the buffers that have something to move and have no worker, and are not
 * to get one at once.  Wakes the workers of the others.  Returns whether there
 * are any.
 */
static bool
list_to_move(Move *move, ClockTime now)
{
	bool		any = false;
	RegistryScan scan;
	SharedBuffer *buffer;

	list_free_deep(move->todo);
	move->todo = NIL;
	registry_begin_scan(&scan);
	while ((buffer = registry_next(&scan)) != NULL)
	{
		Latch	   *latch = *(Latch *volatile *) &buffer->slot.latch;
		MemoryContext oldcontext;
		SharedBufferKey *key;

		if (buffer->table.moved == move->number || registry_is_dropped(buffer))
			continue;
		any = true;
		if (latch != NULL)
		{
			SetLatch(latch);
			continue;
		}
		if (is_starting(&buffer->key) ||
			(registry_wants_worker(buffer) && buffer->slot.start_after <= now &&
			 (ClockTime) pg_atomic_read_u64(&buffer->schedule.wake_at) <= now))
			continue;
		oldcontext = MemoryContextSwitchTo(TopMemoryContext);
		key = palloc(sizeof(SharedBufferKey));
		*key = buffer->key;
		move->todo = lappend(move->todo, key);
		MemoryContextSwitchTo(oldcontext);
	}
	registry_end_scan(&scan);
	return any;
}

/*
 * Move the counters of the first buffer of the list.  Returns false if there are
 * more of them after `until'.
 */
static bool
move_first(Move *move, ClockTime until)
{
	SharedBufferKey *key = linitial(move->todo);
	SharedBuffer *buffer = registry_claim(key->dboid, key->relid);
	bool		over = true;
	MemoryContext oldcontext;

	/* not in the list, so that an error does not come again and again */
	move->todo = list_delete_first(move->todo);
	if (buffer != NULL)
	{
		cannot_move = true;
		if (!registry_is_dropped(buffer))
			do
			{
				move_portion(&move->state, buffer);
				over = move->state.step == MOVE_OVER;
			} while (!over && clock_now() < until);
		cannot_move = false;
		registry_release(buffer, 0);
	}
	if (over)
		pfree(key);
	else
	{
		oldcontext = MemoryContextSwitchTo(TopMemoryContext);
		move->todo = lcons(key, move->todo);
		MemoryContextSwitchTo(oldcontext);
	}
	return over;
}

/*
 * Look through all buffers for what is to be moved, and set when to do so again:
 * if it takes long, because something is pinned, later and later.
 */
static void
look_for_left(Move *move, ClockTime now)
{
	bool		again = ++move->looks > MOVE_AGAIN_LOOKS;

	/* what was allocated before the move began may come into a table later */
	if (!list_to_move(move, now))
		again = move->looks > 1 && !space_is_moved();
	move->look_at = clock_add(now, clock_double(MOVE_LOOK_MIN_MSECS,
												move->looks - 1,
												MOVE_LOOK_MAX_MSECS));
	if (!again)
		return;
	space_move_again();
	move->number = space_moving();
	(void) list_to_move(move, now);
}

/*
 * Have all sessions detach from what was removed, idle ones, too: a catchup
 * interrupt has them run an empty transaction, at the end of which they do it.
 */
static void
wake_sessions(void)
{
	for (uint32 i = 0; i < ProcGlobal->allProcCount; i++)
	{
		PGPROC	   *proc = &ProcGlobal->allProcs[i];
		int			pid = *(volatile int *) &proc->pid;

		/*
		 * if it has just ended, and even if it has a successor, no harm is
		 * done
		 */
		if (pid != 0 && pid != MyProcPid &&
			OidIsValid(*(volatile Oid *) &proc->databaseId))
			compat_send_catchup(proc, pid);
	}
}

/*
 * Begin a move if one is due, and have a part in the one in progress: move what
 * the buffers without a worker have, and end it when nothing is left in the old
 * space.  Returns when to look again if nothing happens before.
 */
static ClockTime
move_counters(ClockTime now)
{
	static Move move;
	ClockTime	until;

	if (space_moving() == 0)
	{
		ClockTime	begin_at = begin_move(now);

		if (space_moving() == 0)
			return begin_at;
	}
	if (move.number != space_moving())
	{
		move.number = space_moving();
		move.looks = 0;
		move.look_at = now;
	}
	if (now >= move.look_at)
		look_for_left(&move, now);
	until = clock_add(now, MOVE_MSECS);
	while (move.todo != NIL)
		if (!move_first(&move, until) || clock_now() >= until)
			return now;

	if (!space_end_move())
		return move.look_at;
	registry_wake_workers(InvalidOid);
	wake_sessions();
	return SCHEDULE_NEVER;
}

static int
compare_candidates(const void *a, const void *b)
{
	ClockTime	due_a = ((const Candidate *) a)->due;
	ClockTime	due_b = ((const Candidate *) b)->due;

	return due_a < due_b ? -1 : (due_a > due_b ? 1 : 0);
}

/*
 * Log that buffers wait for workers, the first of them since `since', if that
 * lasts (idle workers make way in a moment, and a worker may serve many buffers
 * in turn) and was not logged within LOG_AGAIN_MSECS.  Must be called whenever
 * the number of waiting buffers has been determined.  `postmaster' says that
 * the postmaster has no slot.  Returns when to call this again if nothing
 * changes.
 */
static ClockTime
report_full(int nwaiting, ClockTime since, bool postmaster)
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
		report_at = clock_add(Max(report_at, since), LOG_FULL_MSECS);
	if (last_logged != 0)
		report_at = Max(report_at, clock_add(last_logged, LOG_AGAIN_MSECS));
	if (now < report_at)
		return report_at;

	last_logged = now;
	if (postmaster)
		ereport(LOG,
				(errcode(ERRCODE_CONFIGURATION_LIMIT_EXCEEDED),
				 errmsg("out of background worker slots"),
				 errdetail_plural("%d buffer with due keys waits for a statbuffer worker.",
								  "%d buffers with due keys wait for a statbuffer worker.",
								  nwaiting, nwaiting),
				 errhint("You might need to increase \"%s\".",
						 "max_worker_processes")));
	else
		ereport(LOG,
				(errcode(ERRCODE_CONFIGURATION_LIMIT_EXCEEDED),
				 errmsg("out of statbuffer worker slots"),
				 errdetail_plural("%d buffer with due keys waits; the workers take turns.",
								  "%d buffers with due keys wait; the workers take turns.",
								  nwaiting, nwaiting),
				 errhint("You might need to increase \"%s\".",
						 "statbuffer.max_workers")));
	return clock_add(now, LOG_AGAIN_MSECS);
}

/*
 * Walk through the registry: find the buffers that need a worker, sorted by
 * the time when they need it, and count the workers that there are.
 */
static void
walk_registry(Walk *walk)
{
	RegistryScan scan;
	SharedBuffer *buffer;
	int			size = 64;
	Candidate  *candidates = palloc(size * sizeof(Candidate));
	int			n = 0;

	walk->latches = NIL;
	walk->pids = NIL;
	walk->nbuffers = 0;
	registry_begin_scan(&scan);
	while ((buffer = registry_next(&scan)) != NULL)
	{
		Candidate  *candidate;
		pid_t		pid = *(volatile pid_t *) &buffer->slot.pid;
		Latch	   *latch = *(Latch *volatile *) &buffer->slot.latch;

		walk->nbuffers++;
		if (latch != NULL)
			walk->latches = lappend(walk->latches, latch);
		if (pid != 0)
			walk->pids = lappend_int(walk->pids, (int) pid);
		if (pid != 0 || is_starting(&buffer->key))
			continue;
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
		 * A buffer that asks for something is due now.  But one that has just
		 * had a worker comes after those that have been waiting since before
		 * that.
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
	walk->candidates = candidates;
	walk->ncandidates = n;
	walk->nworkers = count_workers(walk->pids);
}

/* The entry of a buffer that waits in the queue. */
static void
set_queue_entry(QueueEntry *entry, const Candidate *candidate)
{
	entry->dboid = candidate->key.dboid;
	entry->relid = candidate->key.relid;
	entry->owner = candidate->owner;
}

/*
 * A walk has begun at `began' and is over: set when the next one may begin.
 * Processes that count wake us for each buffer without a worker.  Where there are
 * many, we would do nothing but walk.
 */
static void
pause_walking(ClockTime began)
{
	ClockTime	now = clock_now();

	walk_after = now + Min((now - began) * WALK_SHARE,
						   WALK_PAUSE_MSECS * INT64CONST(1000));
}

/*
 * Start the workers that are needed, up to the limit.  Returns when to check
 * again if nothing happens before.  While saved counts are being loaded
 * (`loading'), workers take turns, because loading needs buffers without a
 * worker.
 */
static ClockTime
start_workers(bool loading)
{
	ClockTime	next = SCHEDULE_NEVER;
	Walk		walk;
	ListCell   *lc;
	QueueEntry	queue[QUEUE_SIZE];
	int			nwaiting = 0;
	ClockTime	waiting_since = SCHEDULE_NEVER;
	bool		full = false;
	ClockTime	report_at;
	ClockTime	now;
	Oid			gone = InvalidOid;	/* a database that is gone */

	check_started();
	now = clock_now();
	if (now < walk_after)
		return walk_after;
	walk_registry(&walk);
	pause_walking(now);
	now = clock_now();

	for (int i = 0; i < walk.ncandidates; i++)
	{
		Candidate  *candidate = &walk.candidates[i];
		ClockTime	start_at;

		start_at = candidate->due - LAUNCHER_LEAD_MSECS * INT64CONST(1000);
		start_at = Max(start_at, candidate->not_before);
		if (start_at > now)
		{
			next = Min(next, start_at);
			continue;
		}

		if (walk.nworkers < statbuffer_max_workers && now >= register_after)
		{
			ClockTime	again;

			if (candidate->key.dboid == gone)
				continue;
			if (!check_catalogs(candidate, &again))
			{
				gone = candidate->key.dboid;
				next = Min(next, again);
				continue;
			}
			if (start_worker(candidate, walk.nbuffers))
			{
				register_failures = 0;
				walk.nworkers++;
				continue;
			}
			register_failures++;
			register_after = retry_time(register_failures);
			full = true;
		}

		/* only buffers with due keys count as waiting */
		if (candidate->due <= now)
		{
			if (nwaiting < QUEUE_SIZE)
				set_queue_entry(&queue[nwaiting], candidate);
			waiting_since = Min(waiting_since, candidate->due);
			nwaiting++;
		}
		else
			next = Min(next, candidate->due);
		if (register_after > now)
			next = Min(next, register_after);
	}
	pfree(walk.candidates);

	queue_set(queue, Min(nwaiting, QUEUE_SIZE), nwaiting, loading);
	report_at = report_full(nwaiting, waiting_since,
							full || register_after > now);
	next = Min(next, report_at);
	if (nwaiting > 0 || loading)
	{
		foreach(lc, walk.latches)
			SetLatch((Latch *) lfirst(lc));
	}
	return next;
}

/*
 * A process that has failed to map a segment of shared memory may not be able to
 * for the rest of its life: dsm.c keeps the segment, half attached.  So if the
 * launcher cannot move counters, another process is to try.
 */
static bool
must_be_replaced(void)
{
	static ClockTime began = 0;
	ClockTime	now = clock_now();

	if (began == 0)
		began = now;
	if (!cannot_move || !clock_passed(began, now, MOVE_RUN_MSECS))
		return false;

	/* only once if there can be none */
	cannot_move = false;
	return true;
}

/*
 * Handle SIGTERM.  If the server is stopping, save the counts and exit.
 *
 * If only the launcher was terminated, or cannot work, wait until another one has taken its
 * place before exiting.  Otherwise there would be a time without a process
 * that saves counts: the server may be stopped before the postmaster restarts
 * the launcher.  Returns if there cannot be another one.
 */
static void
end_or_hand_over(void)
{
	bool		offered = false;

	for (;;)
	{
		ResetLatch(MyLatch);

		/*
		 * Reset the flag before the check: the postmaster writes its lock
		 * file first and signals then.
		 */
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
						 errmsg("statbuffer launcher keeps running despite a request to terminate"),
						 errdetail("There is no background worker slot for its successor.")));
				return;
			}
			offered = true;
		}
		else if (!launcher_slot_offer(true))
			proc_exit(0);
		CHECK_FOR_INTERRUPTS();

		/* with a timeout: otherwise a shutdown could wait for us forever */
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
 * One iteration of the main loop.  Returns when to run the next if nothing
 * happens before.
 */
static ClockTime
look_around(void)
{
	static LoadProgress progress = LOAD_BLOCKED;	/* so that the first
													 * iteration tries */
	static ClockTime load_at = 0;
	ClockTime	now = clock_now();
	ClockTime	next = request_early_flushes();
	ClockTime	start_at;
	ClockTime	keepers_at;

	/* with an empty registry, nothing else that we do unmaps segments */
	space_unmap_freed();
	if (progress == LOAD_BLOCKED ||
		(progress == LOAD_FAILED && now >= load_at))
	{
		progress = load_continue();
		if (progress == LOAD_FINISHED)
			remove_gone_databases();
		load_at = clock_add(now, LOAD_RETRY_MSECS);
	}
	start_at = start_workers(progress != LOAD_FINISHED);
	next = Min(next, start_at);
	keepers_at = keepers_start();
	next = Min(next, keepers_at);
	if (progress == LOAD_FINISHED)
	{
		ClockTime	move_at = move_counters(now);

		next = Min(next, move_at);
	}
	return progress == LOAD_FINISHED ? next : Min(next, load_at);
}

/*
 * In PG_CATCH: report the error and clean up, so that the main loop can
 * continue.
 */
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

/* The main function of the launcher process. */
void
statbuffer_launcher_main(Datum main_arg)
{
	MemoryContext context;

	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, SignalHandlerForShutdownRequest);
	pqsignal(SIGINT, PG_SIG_IGN);	/* nothing to cancel */
	BackgroundWorkerUnblockSignals();

	/* the same would happen again, so do not ask to be restarted */
	if (!shmem_open(LOG))
		proc_exit(0);
	registry_attach(true);
	if (!launcher_slot_claim())
	{
		/* there is one already */
		proc_exit(0);
	}
	before_shmem_exit(launcher_exit, (Datum) 0);

	BackgroundWorkerInitializeConnection(NULL, NULL, 0);
	pgstat_report_activity(STATE_IDLE, NULL);

	keepers_init();
	context = AllocSetContextCreate(TopMemoryContext, "statbuffer launcher",
									ALLOCSET_DEFAULT_SIZES);
	space_set_limit();
	for (;;)
	{
		ClockTime volatile next = SCHEDULE_NEVER;
		long		timeout = -1;
		int			events = WL_LATCH_SET | WL_EXIT_ON_PM_DEATH;

		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
		if (ShutdownRequestPending || must_be_replaced())
			end_or_hand_over();
		if (ConfigReloadPending)
		{
			ConfigReloadPending = false;
			ProcessConfigFile(PGC_SIGHUP);
			space_set_limit();
		}

		/* survive errors: no other process would save the counts */
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
