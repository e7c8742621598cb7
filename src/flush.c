/*-------------------------------------------------------------------------
 *
 * flush.c
 *	  One flush: from what is due to what is settled.
 *
 * Takes a batch of due keys, hands them to the handler, and commits.  Knows
 * the buffer's definition as it is at that moment, and judges what fails.
 *
 * A batch belongs to a transaction from the moment it is taken.  The
 * transaction's callbacks settle it or give it back, where no interrupt can
 * come between; so nothing is lost or stored twice however the transaction
 * ends.
 *
 * When a batch fails, what was taken is due again at once.  If it is not
 * known which key was to blame, all are suspects: they come in batches of
 * their own, of half as many, until the one that fails is alone.  It backs
 * off, and the others are stored.
 *
 * Only a worker calls what is here, for its one buffer.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "batch.h"
#include "buffer.h"
#include "catalog/namespace.h"
#include "catalog/pg_authid.h"
#include "clock.h"
#include "commands/prepare.h"
#include "commands/sequence.h"
#include "common/int.h"
#include "compat.h"
#include "flush.h"
#include "handler.h"
#include "miscadmin.h"
#include "owner.h"
#include "pgstat.h"
#include "postmaster/interrupt.h"
#include "statbuffer.h"
#include "stopping.h"
#include "storage/lmgr.h"
#include "storage/proc.h"
#include "tcop/tcopprot.h"
#include "utils/backend_status.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/portal.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"
#include "utils/timeout.h"

/* how often a transaction looks whether the worker was told to stop */
#define WATCH_MSECS				100

/* how long the last flush may take before the definition is known */
#define UNKNOWN_SHUTDOWN_MSECS	5000

/* the first attempts of a failing key come at the same pace */
#define STEADY_ATTEMPTS			3
#define BACKOFF_MAX_MSECS		60000

/*
 * Deadlocks and serialization failures in a row that are no failure yet.  The
 * first is followed by a pause of a millisecond, each by one twice as long.
 */
#define CONFLICTS_MAX			10

/*
 * What was cancelled is tried again after this time, or the buffer's backoff
 * if that is less.  After this many in a row a cancel is a failure like any
 * other: it may be the handler that does it.
 */
#define CANCEL_PAUSE_MSECS		1000
#define CANCELS_MAX				3

/* a relation that is gone, but not for everybody, is looked for again */
#define GONE_PAUSE_MSECS		100

/* a lasting failure is told in the log so often */
#define LOG_AGAIN_MSECS			60000
#define LOG_OTHER_MSECS			1000

WorkerState worker;

/* as whom the process has connected, and whether as a superuser */
static Oid	session_owner;
static bool session_is_superuser;
static bool session_is_known = false;


/* the batch, and the keys as they are handed over */
static CounterBatch batch;
static int	batch_size = 0;
static MemoryContext batch_context;

typedef struct FlushKey
{
	HandlerKey	key;
	int			first_item;		/* of the merged ones, in flush_items */
	int			nitems;
} FlushKey;

static HandlerKey *handler_keys;
static FlushKey *flush_keys;
static int	nflush_keys;
static int *flush_items;
static int	current_key;		/* which one is with the handler; -1: none */
static int	current_nkeys;
static bool preparing = false;	/* no handler was called yet */

/* how batches go */
static int	suspect_limit = 1;
static bool mix_failing = false;
static int	conflicts = 0;
static int	cancels = 0;

/* the alarm, and what its handler sees */
static volatile sig_atomic_t watching = false;
static volatile ClockTime handler_due = 0;	/* back by then; 0: has time */
static volatile int handler_msecs;
static volatile sig_atomic_t handler_timed_out = false;
static volatile sig_atomic_t cancellable = false;	/* errors are caught */
static volatile sig_atomic_t cancelled = false;
static SharedBuffer *volatile watched_buffer = NULL;	/* or it is going away */

/* ------------------------------------------------------------------------
 * Signals and timeouts
 * ------------------------------------------------------------------------
 */

/*
 * Somebody cancels what the worker does.  That is not the handler's failure,
 * which may raise the same error by itself.  What is not the user's is not
 * cancelled.
 */
static void
cancel_requested(SIGNAL_ARGS)
{
	if (!cancellable)
		return;
	cancelled = true;
	StatementCancelHandler(COMPAT_PASS_SIGNAL_ARGS);
}

/* Does a call of the handler take longer than the option allows? */
static void
check_handler(ClockTime now)
{
	if (handler_due == 0 || now < handler_due)
		return;

	/* again and again, for a handler that catches the error and goes on */
	handler_due = clock_add(now, handler_msecs);
	handler_timed_out = true;
	QueryCancelPending = true;
	InterruptPending = true;
	SetLatch(MyLatch);
}

/*
 * How long the last flush may take when the server stops, in milliseconds.
 * Called by signal handlers, too.
 */
int
flush_shutdown_msecs(void)
{
	return Min(worker.shutdown_msecs, statbuffer_max_shutdown);
}

/*
 * Comes by during transactions, which may wait for a lock or for a handler.
 * When the server stops, they have as long as the last flush may take.
 * When only this worker shall go, somebody waits for that, DROP DATABASE for
 * example, and the next worker can do it all again.  When the buffer is being
 * stopped, what it does is cancelled.
 */
static void
watch(ClockTime now)
{
	SharedBuffer *watched = watched_buffer;
	ClockTime	halt_at = 0;

	if (watched != NULL)
		halt_at = (ClockTime) pg_atomic_read_u64(&watched->halt_at);
	if (cancellable && halt_at != 0 && now >= halt_at)
	{
		cancelled = true;
		QueryCancelPending = true;
		InterruptPending = true;
		SetLatch(MyLatch);
	}

	if (!ShutdownRequestPending)
		return;
	if (worker.stop_at == 0)
	{
		worker.stop_at = now;
		if (stopping_server())
			worker.stop_at = clock_add(now, flush_shutdown_msecs());
	}
	if (now >= worker.stop_at)
	{
		ProcDiePending = true;
		InterruptPending = true;
		SetLatch(MyLatch);
	}
}

/* Have the alarm go off when there is something to look at next. */
static void
set_alarm(ClockTime now)
{
	ClockTime	when = clock_add(now, WATCH_MSECS);

	if (handler_due != 0)
		when = Min(when, handler_due);
	clock_alarm_by(when);
}

static void
alarm_went_off(SIGNAL_ARGS)
{
	int			save_errno = errno;

	if (watching)
	{
		ClockTime	now = clock_now();

		check_handler(now);
		watch(now);
		set_alarm(now);
	}
	errno = save_errno;
}

/* ------------------------------------------------------------------------
 * Transactions
 * ------------------------------------------------------------------------
 */

static void
xact_callback(XactEvent event, void *arg)
{
	if (event == XACT_EVENT_COMMIT)
		batch_settle(&batch);
	else if (event == XACT_EVENT_ABORT)
		batch_give_back(&batch);
}

static void
report_flushing(int nkeys)
{
	char	   *text = psprintf("%s: flushing %d keys", NameStr(worker.buffer->name),
								nkeys);

	pgstat_report_activity(STATE_RUNNING, text);
}

/*
 * Start a transaction that can be ended from outside.
 *
 * It is a transaction block, as a client's statements between BEGIN and COMMIT
 * are.  Code that a handler calls may ask for that before it does something
 * elsewhere: what does not seem to be in a block need not wait for the commit,
 * and would have been done though the batch is rolled back and comes again.
 */
void
flush_begin_transaction(void)
{
	MemoryContextReset(batch_context);
	handler_timed_out = false;
	flush_keys = NULL;
	flush_items = NULL;
	nflush_keys = 0;
	current_key = -1;
	SetCurrentStatementStartTimestamp();
	StartTransactionCommand();
	BeginTransactionBlock();
	CommitTransactionCommand();
	StartTransactionCommand();
	watching = true;
	set_alarm(clock_now());
}

void
flush_commit_transaction(void)
{
	(void) EndTransactionBlock(false);
	CommitTransactionCommand();
	watching = false;
}

/*
 * In PG_TRY: the same for what can be cancelled, because it waits for others or
 * runs the user's function.
 */
static void
begin_cancellable(void)
{
	cancellable = true;
	flush_begin_transaction();
}

/* After PG_END_TRY: nothing is running, so there is nothing to cancel. */
static void
end_cancellable(void)
{
	cancellable = false;
	cancelled = false;
	QueryCancelPending = false;
}

/* ------------------------------------------------------------------------
 * Coming and going
 * ------------------------------------------------------------------------
 */

/*
 * The process has claimed a buffer, and is its worker.  To be called before
 * it connects to the database.
 */
void
flush_claimed(SharedBuffer *shared)
{
	worker.relid = shared->key.relid;
	worker.shared = shared;
	worker.shutdown_msecs = UNKNOWN_SHUTDOWN_MSECS;
	batch.buffer = shared;
	watched_buffer = shared;
	pqsignal(SIGINT, cancel_requested);
	end_cancellable();
}

/* The process is connected. */
void
flush_connected(void)
{
	clock_make_alarm(alarm_went_off);
	RegisterXactCallback(xact_callback, NULL);

	/* the owner, also if its own settings or the database's say another role */
	SetConfigOption("role", "none", PGC_USERSET, PGC_S_OVERRIDE);
	session_owner = GetSessionUserId();
	batch_context = AllocSetContextCreate(TopMemoryContext,
										  "statbuffer batch",
										  ALLOCSET_DEFAULT_SIZES);
}

/*
 * The process ends, and has rolled back what it did: the buffer is not
 * touched any more.
 */
void
flush_end(void)
{
	watched_buffer = NULL;
	watching = false;
	Assert(batch.nitems == 0);
}

/* ------------------------------------------------------------------------
 * The definition
 * ------------------------------------------------------------------------
 */

/*
 * Lock the buffer's relation, or that of a row type of its keys.  When another
 * session has locked it, or waits to, those who wait for a drain are told:
 * that session may be waiting for one of them.
 */
static void
lock_relation(Oid relid, LOCKMODE lockmode)
{
	if (ConditionalLockRelationOid(relid, lockmode))
		return;
	pg_atomic_write_u32(&worker.shared->locked_out, 1);
	ConditionVariableBroadcast(&shared_control->drain_cv);
	LockRelationOid(relid, lockmode);
	pg_atomic_write_u32(&worker.shared->locked_out, 0);
}

/*
 * Could the process connect as it did when it started, and with the same
 * rights?  If not, it must not go on with those that it has.
 */
static bool
session_is_good(void)
{
	HeapTuple	tuple;
	bool		is_superuser;
	bool		good;

	tuple = SearchSysCache1(AUTHOID, ObjectIdGetDatum(session_owner));
	if (!HeapTupleIsValid(tuple))
		return false;
	good = !COMPAT_OWNER_NEEDS_LOGIN ||
		((Form_pg_authid) GETSTRUCT(tuple))->rolcanlogin;
	is_superuser = ((Form_pg_authid) GETSTRUCT(tuple))->rolsuper;
	ReleaseSysCache(tuple);
	if (!session_is_known)
	{
		session_is_superuser = is_superuser;
		session_is_known = true;
	}
	good = good && session_is_superuser == is_superuser;

	tuple = SearchSysCache1(DATABASEOID, ObjectIdGetDatum(MyDatabaseId));
	if (!HeapTupleIsValid(tuple))
		return false;
	good = good && ((Form_pg_database) GETSTRUCT(tuple))->datallowconn;
	ReleaseSysCache(tuple);
	good = good && (is_superuser ||
					compat_may_connect(MyDatabaseId, session_owner));

	return good;
}

/*
 * Before a flush locks the relation: let an sb_stop() have its way.  Who waits
 * here has no lock that would be in the way of the transaction that it waits
 * for.
 */
static void
pass_gate(void)
{
	LOCKTAG		gate;

	flush_set_gate_tag(&gate, MyDatabaseId, worker.relid);
	if (LockAcquire(&gate, ShareLock, false, true) != LOCKACQUIRE_NOT_AVAIL)
		return;
	pg_atomic_write_u32(&worker.shared->locked_out, 1);
	ConditionVariableBroadcast(&shared_control->drain_cv);
	(void) LockAcquire(&gate, ShareLock, false, false);
	pg_atomic_write_u32(&worker.shared->locked_out, 0);
}

/*
 * Within a transaction: lock the relation, and see what has changed.  Returns
 * false when there is nothing to flush, or not by this process.
 *
 * Raises an error when the buffer can't work as it is defined.
 */
static bool
open_definition(void)
{
	Oid			known_owner = pg_atomic_read_u32(&worker.shared->owner);
	SbBuffer   *opened;

	lock_relation(worker.relid, RowShareLock);
	if (!SearchSysCacheExists1(RELOID, ObjectIdGetDatum(worker.relid)))
	{
		/*
		 * Whoever still counts in it, or has created it and not committed,
		 * has a lock, if not always the one that is expected: see
		 * pending_open().
		 */
		if (!ConditionalLockRelationOid(worker.relid, AccessExclusiveLock))
		{
			worker.paused_until = clock_add(clock_now(), GONE_PAUSE_MSECS);
			return false;
		}
		worker.leaving = true;
		watched_buffer = NULL;
		counters_drop_buffer(worker.shared, false);
		worker.shared = NULL;
		return false;
	}

	opened = buffer_open_locked(worker.relid, lock_relation);
	buffer_attach_worker(opened);
	worker.buffer = opened;
	worker.shutdown_msecs = worker.buffer->options.shutdown;

	/*
	 * A role that is not this one any more must not run the handler.  If it
	 * was not known before who the owner is, its worker can come now.
	 */
	if (worker.buffer->owner != GetSessionUserId())
	{
		if (worker.buffer->owner != known_owner)
			worker.shared->start_after = 0;
		worker.leaving = true;
		return false;
	}
	if (!session_is_good())
	{
		worker.leaving = true;
		return false;
	}
	if (worker.buffer->options.stopped)
	{
		pg_atomic_write_u32(&worker.shared->parked, 1);
		ConditionVariableBroadcast(&shared_control->drain_cv);
		worker.leaving = true;
	}
	else
		pg_atomic_write_u32(&worker.shared->parked, 0);

	/* keys that are scheduled follow a new interval */
	schedule_set_interval(worker.shared, (int64) worker.buffer->options.interval * 1000,
						  clock_now());

	/* and those that did not fit the key columns may fit them now */
	if (worker.shared->seen_shape != worker.buffer->table.shape ||
		worker.shared->seen_shapes != worker.buffer->table.shapes_number)
	{
		worker.shared->seen_shapes = worker.buffer->table.shapes_number;
		worker.shared->seen_shape = worker.buffer->table.shape;
		schedule_retry(worker.shared, clock_now());
	}

	if (worker.buffer->options.batch_size != batch_size)
	{
		MemoryContext oldcontext = MemoryContextSwitchTo(TopMemoryContext);
		int			size = worker.buffer->options.batch_size;

		if (batch.items)
			pfree(batch.items);
		batch.items = NULL;
		batch_size = 0;
		batch.items = palloc_extended(size * sizeof(BatchItem),
									  MCXT_ALLOC_HUGE);
		batch_size = size;
		suspect_limit = size;
		MemoryContextSwitchTo(oldcontext);
	}
	return !worker.buffer->options.stopped;
}

/* ------------------------------------------------------------------------
 * Failures
 * ------------------------------------------------------------------------
 */

static ClockTime
retry_time(int failures)
{
	int64		msecs = worker.buffer ? worker.buffer->options.backoff : 1000;
	int64		most = Max(msecs, BACKOFF_MAX_MSECS);

	for (int i = STEADY_ATTEMPTS; i < failures && msecs < most; i++)
		msecs *= 2;
	return clock_add(clock_now(), Min(msecs, most));
}

/*
 * Tell the log of a failure, unless it was told a while ago, if by another
 * worker of the buffer.
 */
static void
log_failure(ErrorData *edata, int nkeys)
{
	ClockTime	now = clock_now();
	uint64		suppressed = worker.shared->failures_untold;

	if (worker.shared->failure_logged_at != 0 &&
		!clock_passed(worker.shared->failure_logged_at, now,
					  edata->sqlerrcode == worker.shared->failure_logged ?
					  LOG_AGAIN_MSECS : LOG_OTHER_MSECS))
	{
		worker.shared->failures_untold++;
		return;
	}
	worker.shared->failure_logged = edata->sqlerrcode;
	worker.shared->failure_logged_at = now;
	worker.shared->failures_untold = 0;

	ereport(LOG,
			(errcode(edata->sqlerrcode),
			 nkeys > 0 ?
			 errmsg_plural("could not flush %d key of buffer \"%s\": %s",
						   "could not flush %d keys of buffer \"%s\": %s",
						   nkeys, nkeys, NameStr(worker.buffer->name),
						   edata->message) :
			 worker.buffer != NULL ?
			 errmsg("could not flush buffer \"%s\": %s",
					NameStr(worker.buffer->name), edata->message) :
			 errmsg("could not flush buffer %u: %s", worker.relid, edata->message),
			 edata->detail ? errdetail_internal("%s", edata->detail) : 0,
			 edata->hint ? errhint("%s", edata->hint) : 0,
			 edata->context ? errcontext("%s", edata->context) : 0,
			 suppressed > 0 ?
			 errcontext("%llu failures since the last such message",
						(unsigned long long) suppressed) : 0));
}

/*
 * Tell the log what was given up.  What isn't told because it was told a
 * while ago is told later, at the latest when the worker leaves.
 */
void
flush_log_discarded(bool at_once)
{
	static ClockTime last_logged = 0;
	static uint64 sum = 0;
	static bool untold = false;
	ClockTime	now;

	sum += (uint64) batch.discarded;
	untold |= batch.discarded != 0;
	batch.discarded = 0;
	if (!untold)
		return;
	now = clock_now();
	if (!at_once && last_logged != 0 &&
		!clock_passed(last_logged, now, LOG_AGAIN_MSECS))
		return;
	last_logged = now;

	ereport(LOG,
			(errmsg("discarded counts of buffer \"%s\": " INT64_FORMAT,
					NameStr(worker.buffer->name), (int64) sum),
			 errdetail("The handler failed, and the buffer's option \"restart\" is \"temporary\".")));
	sum = 0;
	untold = false;
}

/* Before the transaction is rolled back: say what becomes of each key. */
static bool
judge(ErrorData *edata)
{
	bool		temporary = worker.buffer->options.temporary;
	int			first = 0;
	int			nfailed = 0;

	/*
	 * A conflict with others is no failure, for a while.  The other one has
	 * been woken by now, but may not have been given a processor: he must
	 * have time to take what we are about to take again.
	 */
	if (ERRCODE_TO_CATEGORY(edata->sqlerrcode) == ERRCODE_TRANSACTION_ROLLBACK &&
		conflicts < CONFLICTS_MAX)
	{
		worker.paused_until = clock_add(clock_now(), 1 << conflicts);
		conflicts++;
		return false;
	}
	conflicts = 0;

	mix_failing = false;
	if (batch.nitems == 1)
		nfailed = 1;
	else if (current_key >= 0 && current_nkeys == 1)
	{
		first = flush_keys[current_key].first_item;
		nfailed = flush_keys[current_key].nitems;
	}
	else
	{
		/* not known which: the one that it was will fail again, alone */
		for (int i = 0; i < batch.nitems; i++)
			if (batch.items[i].count != 0)
				batch.items[i].verdict = VERDICT_SUSPECT;
		suspect_limit = Max(batch.nitems / 2, 1);
		return false;
	}

	for (int i = 0; i < nfailed; i++)
	{
		BatchItem  *item = &batch.items[batch.nitems == 1 ? 0 :
										flush_items[first + i]];

		item->verdict = temporary ? VERDICT_DISCARD : VERDICT_BACK_OFF;
		item->retry_at = retry_time(item->counter->failures + 1);
	}
	return true;
}

/*
 * In PG_CATCH: take the error, and roll the transaction back.  Returns the
 * error if it is to be made known.
 */
static ErrorData *
roll_back(int *nitems)
{
	ErrorData  *edata;
	bool		counts = true;

	MemoryContextSwitchTo(batch_context);
	edata = CopyErrorData();
	FlushErrorState();
	if (handler_timed_out && edata->sqlerrcode == ERRCODE_QUERY_CANCELED)
		edata->message = psprintf("handler did not return within %d ms",
								  worker.buffer->options.handler_timeout);

	HOLD_INTERRUPTS();
	handler_due = 0;
	watching = false;
	disable_all_timeouts(false);
	QueryCancelPending = false;
	if (worker.shared != NULL)
		pg_atomic_write_u32(&worker.shared->locked_out, 0);
	*nitems = preparing ? 0 : batch.nitems;
	preparing = false;
	if (cancelled && !handler_timed_out && cancels < CANCELS_MAX &&
		edata->sqlerrcode == ERRCODE_QUERY_CANCELED)
	{
		int			msecs = worker.buffer ? worker.buffer->options.backoff : 1000;

		worker.paused_until = clock_add(clock_now(), Min(msecs, CANCEL_PAUSE_MSECS));
		cancels++;
		counts = false;
	}
	else if (*nitems > 0)
		counts = judge(edata);
	cancelled = false;
	RESUME_INTERRUPTS();

	AbortOutOfAnyTransaction();
	LWLockReleaseAll();
	MemoryContextSwitchTo(batch_context);
	return counts ? edata : NULL;
}

/* After a transaction has failed with so many keys: see that it is known. */
static void
report_failure(ErrorData *edata, int nitems)
{
	if (edata == NULL || worker.shared == NULL)
		return;

	if (nitems == 0)
	{
		/* not a key but the buffer itself fails */
		worker.shared->breakdowns++;
		worker.paused_until = retry_time(worker.shared->breakdowns);
		pg_atomic_fetch_add_u64(&worker.shared->stats[STAT_FAILURES], 1);
	}
	else
		batch_tidy(&batch, nitems, edata->message);
	shared_set_error(worker.shared, edata->message, nitems == 0);
	log_failure(edata, nitems);
}

/* ------------------------------------------------------------------------
 * Flushing
 * ------------------------------------------------------------------------
 */

static int
compare_flush_keys(const void *a, const void *b, void *order)
{
	const FlushKey *ka = a;
	const FlushKey *kb = b;

	return key_order_compare(order, ka->key.values, ka->key.isnull,
							 kb->key.values, kb->key.isnull);
}

/*
 * Sort the batch by key, and merge keys that their types call equal.
 */
static void
arrange_batch(void)
{
	TupleDesc	desc = worker.buffer->shape->desc;
	KeyOrder   *order = key_order_make(desc);
	FlushKey   *sorted;
	int			n = batch.nitems;
	int			nkeys = 0;

	sorted = palloc_extended(n * sizeof(FlushKey), MCXT_ALLOC_HUGE);
	for (int i = 0; i < n; i++)
	{
		SharedCounter *counter = batch.items[i].counter;

		sorted[i].key.values = palloc(desc->natts * sizeof(Datum));
		sorted[i].key.isnull = palloc(desc->natts * sizeof(bool));
		key_deform(desc, counter->key, counter->keylen,
				   sorted[i].key.values, sorted[i].key.isnull);
		sorted[i].key.count = batch.items[i].count;
		sorted[i].first_item = i;
	}
	qsort_arg(sorted, n, sizeof(FlushKey), compare_flush_keys, order);

	flush_items = palloc_extended(n * sizeof(int), MCXT_ALLOC_HUGE);
	flush_keys = sorted;
	for (int i = 0; i < n; i++)
	{
		FlushKey	next = sorted[i];
		FlushKey   *last = nkeys > 0 ? &sorted[nkeys - 1] : NULL;

		flush_items[i] = next.first_item;
		if (last && compare_flush_keys(last, &next, order) == 0)
		{
			int64		sum;

			/* what doesn't fit in one call is left for the next batch */
			if (pg_add_s64_overflow(last->key.count, next.key.count, &sum))
				batch_pass_over(&batch, next.first_item);
			else
				last->key.count = sum;
			last->nitems++;
			continue;
		}
		next.first_item = i;
		next.nitems = 1;
		sorted[nkeys++] = next;
	}

	/* counts that add up to nothing are done with */
	nflush_keys = 0;
	handler_keys = palloc_extended(n * sizeof(HandlerKey), MCXT_ALLOC_HUGE);
	for (int i = 0; i < nkeys; i++)
	{
		if (sorted[i].key.count == 0)
			continue;
		sorted[nflush_keys] = sorted[i];
		handler_keys[nflush_keys++] = sorted[i].key;
	}
}

/*
 * Whatever role a handler has taken on, the next call begins as the owner.
 * Back to what was set when the process connected: that reads no catalogs.
 */
static void
become_owner(void)
{
	if (GetSessionUserId() != session_owner)
		SetConfigOption("session_authorization", NULL, PGC_USERSET,
						PGC_S_SESSION);
	if (GetUserId() != session_owner)
		SetConfigOption("role", NULL, PGC_USERSET, PGC_S_SESSION);
}

/*
 * A handler can change the session that it runs in.  Each flush is to find it
 * as the first one did: a role, a search path or a temporary table that was
 * left there would decide what the next one stores, and where; a lock would
 * be held until the worker leaves.
 */
static void
reset_session(void)
{
	ErrorData  *volatile error = NULL;
	int			nfailed = 0;
	Oid			temp_namespace;
	Oid			toast_namespace;

	PortalHashTableDeleteAll();
	DropAllPreparedStatements();
	LockReleaseAll(USER_LOCKMETHOD, true);
	ResetSequenceCaches();
	ResetAllOptions();
	become_owner();

	GetTempNamespaceState(&temp_namespace, &toast_namespace);
	if (!OidIsValid(temp_namespace))
		return;
	PG_TRY();
	{
		flush_begin_transaction();
		PushActiveSnapshot(GetTransactionSnapshot());
		ResetTempTableNamespace();
		PopActiveSnapshot();
		flush_commit_transaction();
	}
	PG_CATCH();
	{
		error = roll_back(&nfailed);
		worker.leaving = true;
	}
	PG_END_TRY();
	report_failure(error, nfailed);
}

/* Called before each call of the handler. */
static void
begin_call(int first_key, int nkeys, void *arg)
{
	become_owner();

	/* the time of the call before may have run out when it had returned */
	handler_due = 0;
	if (handler_timed_out)
	{
		handler_timed_out = false;
		QueryCancelPending = false;
	}
	current_key = first_key;
	current_nkeys = nkeys;
	pg_atomic_fetch_add_u64(&worker.shared->stats[STAT_HANDLER_CALLS], 1);

	if (worker.buffer->options.handler_timeout > 0)
	{
		ClockTime	now = clock_now();

		handler_msecs = worker.buffer->options.handler_timeout;
		handler_due = clock_add(now, handler_msecs);
		set_alarm(now);
	}
}

static void
call_handler(Handler *handler)
{
	if (nflush_keys == 0)
		return;

	handler_timed_out = false;
	handler_call(handler, handler_keys, nflush_keys, begin_call, NULL);
	handler_due = 0;
	current_key = -1;

	/* it came back just when the time was up */
	if (handler_timed_out)
		QueryCancelPending = false;
	CHECK_FOR_INTERRUPTS();
}

/*
 * Flush up to a batch of due keys in one transaction.  Doesn't raise errors
 * of what the user's function and definitions may do.
 */
void
flush_batch(ClockTime now)
{
	volatile int ntaken = 0;
	volatile bool had_failing = false;
	volatile bool had_suspects = false;
	ErrorData  *volatile error = NULL;
	int			nfailed = 0;

	PG_TRY();
	{
		begin_cancellable();
		pass_gate();
		if (open_definition())
		{
			Handler    *handler;
			BufferUse	use;

			/* the handler can do anything, but not alter what is in use */
			buffer_begin_use(worker.buffer, &use);
			PushActiveSnapshot(GetTransactionSnapshot());
			MemoryContextSwitchTo(batch_context);
			ntaken = batch_take(&batch, &worker.buffer->table,
								batch_size, suspect_limit, mix_failing,
								now,
								clock_add(now, BACKOFF_MAX_MSECS));
			for (int i = 0; i < ntaken; i++)
				had_failing |= batch.items[i].counter->failures > 0;
			had_suspects = ntaken > 0 &&
				(pg_atomic_read_u32(&batch.items[0].counter->pins) &
				 COUNTER_SUSPECT) != 0;
			if (ntaken > 0)
			{
				preparing = true;
				handler = handler_prepare(worker.buffer->options.handler,
										  worker.buffer->shape->desc,
										  worker.buffer->owner);
				preparing = false;
				report_flushing(ntaken);
				arrange_batch();
				call_handler(handler);
			}
			PopActiveSnapshot();
			buffer_end_use(&use);

			/* with nothing to flush, it is not known whether it would work */
			if (ntaken > 0)
			{
				worker.shared->breakdowns = 0;
				shared_mend(worker.shared);
			}
		}
		flush_commit_transaction();
	}
	PG_CATCH();
	{
		error = roll_back(&nfailed);
		ntaken = 0;
	}
	PG_END_TRY();
	end_cancellable();
	report_failure(error, nfailed);
	flush_log_discarded(false);

	if (ntaken > 0)
	{
		batch_tidy(&batch, ntaken, NULL);
		conflicts = 0;
		cancels = 0;
		if (had_suspects)
			suspect_limit = Min((int64) suspect_limit * 2, batch_size);
		mix_failing = mix_failing || had_failing;
	}
	if (!worker.leaving)
		reset_session();
	if (worker.shared != NULL && batch.nforeign > 0)
	{
		shared_set_error(worker.shared, _("Keys are held that were counted before the key columns were altered. Alter the columns back to have them stored, or discard them with TRUNCATE."),
						 false);
		batch.nforeign = 0;
	}
	pgstat_report_stat(false);
	if (worker.buffer != NULL)
		pgstat_report_activity(STATE_IDLE, NameStr(worker.buffer->name));
}

/*
 * Look at the definition, outside of a flush.  When a new session of the owner
 * would look for the handler elsewhere than this one does, which has the
 * settings that it began with, another worker takes its place.
 */
void
flush_check_definition(void)
{
	bool		is_new = worker.buffer == NULL;
	ErrorData  *volatile error = NULL;
	int			nfailed = 0;

	PG_TRY();
	{
		begin_cancellable();
		pass_gate();
		if (open_definition())
		{
			pgstat_report_activity(STATE_IDLE, NameStr(worker.buffer->name));
			if (!is_new &&
				strcmp(owner_search_path(worker.buffer->owner),
					   GetConfigOptionResetString("search_path")) != 0)
			{
				worker.shared->start_after = 0;
				pg_atomic_write_u32(&worker.shared->recheck, 1);
				worker.leaving = true;
			}
		}
		flush_commit_transaction();
	}
	PG_CATCH();
	{
		error = roll_back(&nfailed);
	}
	PG_END_TRY();
	end_cancellable();
	report_failure(error, nfailed);
}
