/*-------------------------------------------------------------------------
 *
 * worker.c
 *	  The process that flushes a busy buffer.
 *
 * A worker is connected to the buffer's database as the buffer's owner.  It
 * waits until keys are due, takes a batch of them, hands them to the handler
 * and commits, again and again.  It leaves when there is nothing to do for a
 * while, when others wait for its slot, and when it is told to.
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
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/table.h"
#include "access/xact.h"
#include "batch.h"
#include "buffer.h"
#include "common/int.h"
#include "compat.h"
#include "handler.h"
#include "libpq/pqsignal.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "stopping.h"
#include "storage/ipc.h"
#include "storage/lmgr.h"
#include "storage/proc.h"
#include "storage/procsignal.h"
#include "tcop/tcopprot.h"
#include "utils/backend_status.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"
#include "utils/timeout.h"
#include "utils/timestamp.h"
#include "worker.h"

/* a slot can be taken from a worker that had it so long */
#define TURN_MSECS				1000

/* how often a transaction looks whether the worker was told to stop */
#define WATCH_MSECS				100

/* the first attempts of a failing key come at the same pace */
#define STEADY_ATTEMPTS			3
#define BACKOFF_MAX_MSECS		60000

/* deadlocks and serialization failures in a row that are no failure yet */
#define CONFLICTS_MAX			10

/* what was cancelled is left be for so long, if not less */
#define CANCEL_PAUSE_MSECS		1000

/* a lasting failure is told in the log so often */
#define LOG_AGAIN_MSECS			60000
#define LOG_OTHER_MSECS			1000

/* reaping looks at no more than so many keys for each that it may free */
#define REAP_EFFORT				64
#define REAP_MIN_MSECS			100

/* a table that held so many keys is given back when it is empty */
#define BIG_TABLE				1024

static SharedBuffer *shared = NULL;
static SbBuffer *buffer = NULL;
static Oid	relid;
static bool leaving = false;	/* the main loop ends */
static TimestampTz started;
static bool schedule_told = false;	/* wake_at is right for who comes next */

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
static TimestampTz paused_until = 0;

/* when idle keys were reaped, and the most keys that the table has had */
static TimestampTz last_reap = 0;
static uint64 most_keys = 0;

/* timeouts, and what their handlers see */
static TimeoutId handler_timeout_id;
static TimeoutId watch_timeout_id;
static volatile sig_atomic_t handler_timed_out = false;
static volatile sig_atomic_t handler_active = false;
static volatile sig_atomic_t cancelled = false;
static volatile int shutdown_msecs = 5000;
static volatile TimestampTz stop_at = 0;
static SharedBuffer *volatile watched_buffer = NULL;	/* or it is going away */

static TimestampTz next_reap(void);

/* ------------------------------------------------------------------------
 * Signals and timeouts
 * ------------------------------------------------------------------------
 */

/*
 * Somebody cancels what the worker does.  That is not the handler's failure,
 * which may raise the same error by itself.
 */
static void
cancel_requested(SIGNAL_ARGS)
{
	cancelled = true;
	StatementCancelHandler(postgres_signal_arg);
}

/* A call of the handler takes longer than the option allows. */
static void
handler_timeout_expired(void)
{
	if (!handler_active)
		return;
	handler_timed_out = true;
	QueryCancelPending = true;
	InterruptPending = true;
	SetLatch(MyLatch);
}

/*
 * Comes by during transactions, which may wait for a lock or for a handler.
 * When the server stops, they have as long as the option "shutdown" says.
 * When only this worker shall go, somebody waits for that, DROP DATABASE for
 * example, and the next worker can do it all again.  When the buffer is being
 * stopped, what it does is cancelled.
 */
static void
watch(void)
{
	SharedBuffer *watched = watched_buffer;
	TimestampTz halt_at = 0;

	if (watched != NULL)
		halt_at = (TimestampTz) pg_atomic_read_u64(&watched->halt_at);
	if (halt_at != 0 && GetCurrentTimestamp() >= halt_at)
	{
		cancelled = true;
		QueryCancelPending = true;
		InterruptPending = true;
		SetLatch(MyLatch);
	}

	if (!ShutdownRequestPending)
		return;
	if (stop_at == 0)
	{
		stop_at = GetCurrentTimestamp();
		if (stopping_server())
			stop_at = TimestampTzPlusMilliseconds(stop_at, shutdown_msecs);
	}
	if (GetCurrentTimestamp() >= stop_at)
	{
		ProcDiePending = true;
		InterruptPending = true;
		SetLatch(MyLatch);
	}
}

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
	watched_buffer = NULL;
	LWLockReleaseAll();
	Assert(batch.nitems == 0);
	if (shared != NULL)
	{
		pg_atomic_write_u32(&shared->locked_out, 0);
		shared->reap_at = shared->nidle > 0 && buffer != NULL ? next_reap() :
			SCHEDULE_NEVER;
		if (!schedule_told)
			schedule_leave(shared);
	}
	shared_release_claims(code);
	shared = NULL;
}

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
	char	   *text = psprintf("%s: flushing %d keys", NameStr(buffer->name),
								nkeys);

	pgstat_report_activity(STATE_RUNNING, text);
}

/* Start a transaction that can be ended from outside. */
static void
begin_transaction(void)
{
	MemoryContextReset(batch_context);
	handler_timed_out = false;
	flush_keys = NULL;
	flush_items = NULL;
	nflush_keys = 0;
	current_key = -1;
	SetCurrentStatementStartTimestamp();
	StartTransactionCommand();
	enable_timeout_every(watch_timeout_id,
						 TimestampTzPlusMilliseconds(GetCurrentTimestamp(),
													 WATCH_MSECS),
						 WATCH_MSECS);
}

static void
commit_transaction(void)
{
	CommitTransactionCommand();
	disable_timeout(watch_timeout_id, false);
}

/* ------------------------------------------------------------------------
 * The definition
 * ------------------------------------------------------------------------
 */

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

	begin_transaction();
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
			!ConditionalLockRelationOid(other_relid, RowShareLock) ||
			SearchSysCacheExists1(RELOID, ObjectIdGetDatum(other_relid)))
			continue;
		other = shared_claim_worker(MyDatabaseId, other_relid);
		if (other != NULL)
			counters_drop_buffer(other, false);
	}
	commit_transaction();
}

/*
 * Lock the relation.  When somebody else has locked it, or waits to, those who
 * wait for a drain are told: they may be the ones whom he waits for.
 */
static void
lock_relation(void)
{
	if (ConditionalLockRelationOid(relid, RowShareLock))
		return;
	pg_atomic_write_u32(&shared->locked_out, 1);
	ConditionVariableBroadcast(&shared_control->drain_cv);
	LockRelationOid(relid, RowShareLock);
	pg_atomic_write_u32(&shared->locked_out, 0);
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
	Oid			known_owner = pg_atomic_read_u32(&shared->owner);
	SbBuffer   *opened;

	lock_relation();
	if (!SearchSysCacheExists1(RELOID, ObjectIdGetDatum(relid)))
	{
		leaving = true;
		watched_buffer = NULL;
		counters_drop_buffer(shared, false);
		shared = NULL;
		return false;
	}

	opened = buffer_open(relid, NoLock);
	buffer_attach(opened, true);
	buffer = opened;
	shutdown_msecs = buffer->options.shutdown;

	/*
	 * A role that is not this one any more must not run the handler.  If it
	 * was not known before who the owner is, its worker can come now.
	 */
	if (buffer->owner != GetSessionUserId())
	{
		if (buffer->owner != known_owner)
			shared->start_after = 0;
		leaving = true;
		return false;
	}
	if (buffer->options.stopped)
	{
		pg_atomic_write_u32(&shared->parked, 1);
		ConditionVariableBroadcast(&shared_control->drain_cv);
		leaving = true;
	}
	else
		pg_atomic_write_u32(&shared->parked, 0);

	/* keys that are scheduled follow a new interval */
	schedule_set_interval(shared, (int64) buffer->options.interval * 1000,
						  GetCurrentTimestamp());

	/* and those that did not fit the key columns may fit them now */
	if (shared->seen_shape != buffer->table.shape)
	{
		shared->seen_shape = buffer->table.shape;
		schedule_retry(shared, GetCurrentTimestamp());
	}

	if (buffer->options.batch_size != batch_size)
	{
		MemoryContext oldcontext = MemoryContextSwitchTo(TopMemoryContext);
		int			size = buffer->options.batch_size;

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
	return !buffer->options.stopped;
}

/* ------------------------------------------------------------------------
 * Failures
 * ------------------------------------------------------------------------
 */

static TimestampTz
retry_time(int failures)
{
	int64		msecs = buffer ? buffer->options.backoff : 1000;
	int64		most = Max(msecs, BACKOFF_MAX_MSECS);

	for (int i = STEADY_ATTEMPTS; i < failures && msecs < most; i++)
		msecs *= 2;
	return TimestampTzPlusMilliseconds(GetCurrentTimestamp(),
									   Min(msecs, most));
}

/*
 * Tell the log of a failure, unless it was told a while ago, if by another
 * worker of the buffer.
 */
static void
log_failure(ErrorData *edata, int nkeys)
{
	TimestampTz now = GetCurrentTimestamp();
	uint64		suppressed = shared->failures_untold;

	if (shared->failure_logged_at != 0 &&
		!TimestampDifferenceExceeds(shared->failure_logged_at, now,
									edata->sqlerrcode == shared->failure_logged ?
									LOG_AGAIN_MSECS : LOG_OTHER_MSECS))
	{
		shared->failures_untold++;
		return;
	}
	shared->failure_logged = edata->sqlerrcode;
	shared->failure_logged_at = now;
	shared->failures_untold = 0;

	ereport(LOG,
			(errcode(edata->sqlerrcode),
			 nkeys > 0 ?
			 errmsg_plural("could not flush %d key of buffer \"%s\": %s",
						   "could not flush %d keys of buffer \"%s\": %s",
						   nkeys, nkeys, NameStr(buffer->name),
						   edata->message) :
			 buffer != NULL ?
			 errmsg("could not flush buffer \"%s\": %s",
					NameStr(buffer->name), edata->message) :
			 errmsg("could not flush buffer %u: %s", relid, edata->message),
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
static void
log_discarded(bool at_once)
{
	static TimestampTz last_logged = 0;
	static uint64 sum = 0;
	static bool untold = false;
	TimestampTz now;

	sum += (uint64) batch.discarded;
	untold |= batch.discarded != 0;
	batch.discarded = 0;
	if (!untold)
		return;
	now = GetCurrentTimestamp();
	if (!at_once && last_logged != 0 &&
		!TimestampDifferenceExceeds(last_logged, now, LOG_AGAIN_MSECS))
		return;
	last_logged = now;

	ereport(LOG,
			(errmsg("discarded counts of buffer \"%s\": " INT64_FORMAT,
					NameStr(buffer->name), (int64) sum),
			 errdetail("The handler failed, and the buffer's option \"restart\" is \"temporary\".")));
	sum = 0;
	untold = false;
}

/* Before the transaction is rolled back: say what becomes of each key. */
static bool
judge(ErrorData *edata)
{
	bool		temporary = buffer->options.temporary;
	int			first = 0;
	int			nfailed = 0;

	/* a conflict with others is no failure, for a while */
	if (ERRCODE_TO_CATEGORY(edata->sqlerrcode) == ERRCODE_TRANSACTION_ROLLBACK &&
		conflicts < CONFLICTS_MAX)
	{
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
								  buffer->options.handler_timeout);

	HOLD_INTERRUPTS();
	handler_active = false;
	disable_all_timeouts(false);
	QueryCancelPending = false;
	if (shared != NULL)
		pg_atomic_write_u32(&shared->locked_out, 0);
	*nitems = preparing ? 0 : batch.nitems;
	preparing = false;
	if (cancelled && !handler_timed_out &&
		edata->sqlerrcode == ERRCODE_QUERY_CANCELED)
	{
		int			msecs = buffer ? buffer->options.backoff : 1000;

		paused_until = TimestampTzPlusMilliseconds(GetCurrentTimestamp(),
												   Min(msecs, CANCEL_PAUSE_MSECS));
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
	if (edata == NULL || shared == NULL)
		return;

	if (nitems == 0)
	{
		/* not a key but the buffer itself fails */
		shared->breakdowns++;
		paused_until = retry_time(shared->breakdowns);
		pg_atomic_fetch_add_u64(&shared->stats[STAT_FAILURES], 1);
	}
	else
		batch_tidy(&batch, nitems, edata->message);
	shared_set_error(shared, edata->message, nitems == 0);
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
	TupleDesc	desc = buffer->desc;
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

/* Called before each call of the handler. */
static void
begin_call(int first_key, int nkeys, void *arg)
{
	/* the time of the call before may have run out when it had returned */
	disable_timeout(handler_timeout_id, false);
	if (handler_timed_out)
	{
		handler_timed_out = false;
		QueryCancelPending = false;
	}
	current_key = first_key;
	current_nkeys = nkeys;
	pg_atomic_fetch_add_u64(&shared->stats[STAT_HANDLER_CALLS], 1);

	/* again and again, for a handler that catches the error and goes on */
	if (buffer->options.handler_timeout > 0)
		enable_timeout_every(handler_timeout_id,
							 TimestampTzPlusMilliseconds(GetCurrentTimestamp(),
														 buffer->options.handler_timeout),
							 buffer->options.handler_timeout);
}

static void
call_handler(Handler *handler)
{
	if (nflush_keys == 0)
		return;

	handler_timed_out = false;
	handler_active = true;
	handler_call(handler, handler_keys, nflush_keys, begin_call, NULL);
	handler_active = false;
	disable_timeout(handler_timeout_id, false);
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
static void
flush_batch(TimestampTz now)
{
	volatile int ntaken = 0;
	volatile bool had_failing = false;
	volatile bool had_suspects = false;
	ErrorData  *volatile error = NULL;
	int			nfailed = 0;

	PG_TRY();
	{
		begin_transaction();
		if (open_definition())
		{
			Handler    *handler;
			Relation	rel;

			/* the handler can do anything, but not alter what is in use */
			rel = table_open(relid, NoLock);
			PushActiveSnapshot(GetTransactionSnapshot());
			MemoryContextSwitchTo(batch_context);
			ntaken = batch_take(&batch, &buffer->table,
								batch_size, suspect_limit, mix_failing,
								now,
								TimestampTzPlusMilliseconds(now,
															BACKOFF_MAX_MSECS));
			for (int i = 0; i < ntaken; i++)
				had_failing |= batch.items[i].counter->failures > 0;
			had_suspects = ntaken > 0 &&
				(pg_atomic_read_u32(&batch.items[0].counter->pins) &
				 COUNTER_SUSPECT) != 0;
			if (ntaken > 0)
			{
				preparing = true;
				handler = handler_prepare(buffer->options.handler,
										  buffer->desc, buffer->owner);
				preparing = false;
				report_flushing(ntaken);
				arrange_batch();
				call_handler(handler);
			}
			PopActiveSnapshot();
			table_close(rel, NoLock);

			/* with nothing to flush, it is not known whether it would work */
			if (ntaken > 0)
			{
				shared->breakdowns = 0;
				shared_mend(shared);
			}
		}
		commit_transaction();
	}
	PG_CATCH();
	{
		error = roll_back(&nfailed);
		ntaken = 0;
	}
	PG_END_TRY();
	report_failure(error, nfailed);
	log_discarded(false);

	if (ntaken > 0)
	{
		batch_tidy(&batch, ntaken, NULL);
		conflicts = 0;
		if (had_suspects)
			suspect_limit = Min((int64) suspect_limit * 2, batch_size);
		mix_failing = mix_failing || had_failing;
	}
	if (shared != NULL && batch.nforeign > 0)
	{
		shared_set_error(shared, _("Keys are held that were counted before the key columns were altered. Alter the columns back to have them stored, or discard them with TRUNCATE."),
						 false);
		batch.nforeign = 0;
	}
	pgstat_report_stat(false);
	if (buffer != NULL)
		pgstat_report_activity(STATE_IDLE, NameStr(buffer->name));
}

/* Look at the definition, outside of a flush. */
static void
check_definition(void)
{
	ErrorData  *volatile error = NULL;
	int			nfailed = 0;

	PG_TRY();
	{
		begin_transaction();
		if (open_definition())
			pgstat_report_activity(STATE_IDLE, NameStr(buffer->name));
		commit_transaction();
	}
	PG_CATCH();
	{
		error = roll_back(&nfailed);
	}
	PG_END_TRY();
	report_failure(error, nfailed);
}

/*
 * The server stops: flush what there is, and what sessions that are just
 * being terminated still publish, until the time is up.
 */
static void
last_flush(void)
{
	TimestampTz now = GetCurrentTimestamp();
	bool		was_alone = false;

	/* it had no time to look at it */
	if (buffer == NULL)
		check_definition();
	if (buffer == NULL || shared == NULL || shutdown_msecs == 0)
		return;
	if (stop_at == 0)
		stop_at = TimestampTzPlusMilliseconds(now, shutdown_msecs);
	for (;;)
	{
		/* who isn't there any more has published */
		bool		alone = stopping_sessions(MyDatabaseId) == 0;

		/* keys that fail have their turn when all others are stored */
		batch_serve_requests(shared, now);
		schedule_advance(shared, now);
		schedule_make_all_due(shared, was_alone, now);
		while (now < stop_at &&
			   DsaPointerIsValid(shared->schedule.due_head))
		{
			flush_batch(now);
			now = GetCurrentTimestamp();

			/* not a key but the buffer itself fails */
			if (leaving || shared == NULL || shared->breakdowns > 0)
				return;
		}
		if (was_alone || now >= stop_at)
			return;

		was_alone = alone;
		if (!alone)
		{
			(void) WaitLatch(MyLatch,
							 WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
							 10L, compat_wait_event("StatbufferShutdown"));
			ResetLatch(MyLatch);
		}
		now = GetCurrentTimestamp();
	}
}

/* ------------------------------------------------------------------------
 * Reaping
 * ------------------------------------------------------------------------
 */

/* When idle keys are to be reaped next; SCHEDULE_NEVER when there are none. */
static TimestampTz
next_reap(void)
{
	int64		timeout = (int64) buffer->options.timeout * 1000;
	int64		pause;
	double		effort;

	if (shared->nidle == 0)
		return SCHEDULE_NEVER;

	/*
	 * Reaping looks at every key that is held.  So it waits until enough are
	 * idle to be worth it, in proportion.
	 */
	effort = (double) pg_atomic_read_u64(&shared->nkeys) /
		((double) REAP_EFFORT * shared->nidle);
	pause = Max(timeout / 4, REAP_MIN_MSECS * 1000);
	if (effort > 1)
		pause = Min((double) pause * effort * 4, 3600.0 * USECS_PER_SEC);
	return Max(shared->oldest_idle + timeout, last_reap + pause);
}

static void
reap(TimestampTz now, TimestampTz idle_before)
{
	most_keys = Max(most_keys, pg_atomic_read_u64(&shared->nkeys));
	counters_reap(shared, &buffer->table, idle_before);
	last_reap = now;
}

/*
 * Nothing was to be done for a while: give back the memory of idle keys, and
 * that of the table when it is empty and was big.
 */
static void
give_memory_back(TimestampTz now)
{
	reap(now, now - (int64) buffer->options.timeout * 1000);
	if (most_keys < BIG_TABLE || pg_atomic_read_u64(&shared->nkeys) != 0)
		return;

	begin_transaction();
	if (ConditionalLockRelationOid(relid, ExclusiveLock) &&
		pg_atomic_read_u64(&shared->nkeys) == 0 &&
		buffer->table.number == shared->table_number)
	{
		counters_replace_table(shared);
		buffer_attach(buffer_open(relid, NoLock), true);
		most_keys = 0;
	}
	commit_transaction();
}

/*
 * Memory is short: free what is idle, whether it is worth the effort by
 * itself or not.  While there is more to come, looking at every key that is
 * held has to be worth it.  Returns whether there is.
 */
static bool
relieve(TimestampTz now, bool more)
{
	if (shared->nidle > (more ? pg_atomic_read_u64(&shared->nkeys) / 4 : 0))
		reap(now, now);
	return more;
}

/* ------------------------------------------------------------------------
 * The main loop
 * ------------------------------------------------------------------------
 */

/* Is it time to leave, seeing that no key is due before `next'? */
static bool
may_leave(TimestampTz now, TimestampTz last_work, TimestampTz next)
{
	/* somebody waits for the slot: let him have it, after a turn */
	if (pg_atomic_read_u32(&shared_control->waiting) > 0)
		return next > TimestampTzPlusMilliseconds(now, TURN_MSECS) ||
			TimestampDifferenceExceeds(started, now, TURN_MSECS);

	/* a broken buffer is left alone meanwhile */
	if (paused_until > now || buffer == NULL)
		return paused_until > TimestampTzPlusMilliseconds(now,
														  LAUNCHER_LEAD_MSECS);
	return now >= TimestampTzPlusMilliseconds(last_work,
											  buffer->options.timeout) &&
		(next == SCHEDULE_NEVER ||
		 next > TimestampTzPlusMilliseconds(now, LAUNCHER_LEAD_MSECS));
}

static void
worker_loop(void)
{
	TimestampTz last_work = started;
	uint64		drain_seen = pg_atomic_read_u64(&shared->drain_asked);
	bool		flushed = false;
	bool		relieving = false;

	while (!leaving)
	{
		TimestampTz now;
		TimestampTz next;
		TimestampTz wake_at;
		bool		due;

		ResetLatch(MyLatch);
		cancelled = false;
		QueryCancelPending = false; /* nothing is running */
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

		now = GetCurrentTimestamp();
		schedule_awake(shared);

		schedule_check_clock(shared, now);

		/* somebody asked for something: that is a reason to try again, too */
		if (pg_atomic_exchange_u32(&shared->recheck, 0) != 0 ||
			(buffer == NULL && now >= paused_until))
		{
			paused_until = 0;
			check_definition();
			if (leaving)
				continue;
		}
		if (pg_atomic_read_u32(&shared->flush_all) != 0 ||
			DsaPointerIsValid(pg_atomic_read_u64(&shared->flush_requests)) ||
			pg_atomic_read_u64(&shared->drain_asked) != drain_seen)
			paused_until = 0;
		drain_seen = pg_atomic_read_u64(&shared->drain_asked);
		batch_serve_requests(shared, now);
		schedule_advance(shared, now);
		if (pg_atomic_exchange_u32(&shared->relieve, 0) != 0)
		{
			schedule_make_all_due(shared, false, now);
			relieving = true;
		}

		next = schedule_next(shared);
		due = next == 0;
		if (relieving && buffer != NULL)
			relieving = relieve(now, due && now >= paused_until);
		if (due && now >= paused_until)
		{
			flush_batch(now);
			last_work = now;

			/* others wait, and this worker has had its turn */
			if (flushed && pg_atomic_read_u32(&shared_control->waiting) > 0 &&
				TimestampDifferenceExceeds(started, now, TURN_MSECS))
				break;
			flushed = true;
			continue;
		}
		if (due || buffer == NULL)
			next = paused_until;

		if (buffer != NULL && next_reap() <= now)
			reap(now, now - (int64) buffer->options.timeout * 1000);

		if (may_leave(now, last_work, next))
		{
			if (buffer != NULL && paused_until <= now &&
				pg_atomic_read_u32(&shared_control->waiting) == 0)
			{
				/* nobody may have told us that it was dropped */
				check_definition();
				if (leaving || paused_until > now ||
					schedule_next(shared) != next)
					continue;
				give_memory_back(now);
			}
			if (paused_until > now)
				shared->start_after = paused_until;
			schedule_told = schedule_sleep_until(shared, next, next);
			if (schedule_told)
				break;
			continue;
		}

		wake_at = next;
		if (buffer != NULL)
		{
			TimestampTz quiet = TimestampTzPlusMilliseconds(last_work,
															buffer->options.timeout);

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
		if (due || buffer == NULL || schedule_sleep_until(shared, next, wake_at))
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

	memcpy(&argument, MyBgworkerEntry->bgw_extra, sizeof(argument));
	relid = argument.relid;

	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGINT, cancel_requested);
	pqsignal(SIGTERM, SignalHandlerForShutdownRequest);
	BackgroundWorkerUnblockSignals();

	if (!shared_attach(false))
		proc_exit(0);
	stopping_stand_by();
	shared = shared_claim_worker(argument.dboid, relid);
	if (shared == NULL)
		proc_exit(0);
	before_shmem_exit(worker_exit, (Datum) 0);
	batch.buffer = shared;
	watched_buffer = shared;

	BackgroundWorkerInitializeConnectionByOid(argument.dboid, argument.owner,
											  COMPAT_WORKER_FLAGS);
	if (OidIsValid(argument.owner))
		shared->start_failures = 0;
	shared->worker_connected = true;

	handler_timeout_id = RegisterTimeout(USER_TIMEOUT,
										 handler_timeout_expired);
	watch_timeout_id = RegisterTimeout(USER_TIMEOUT, watch);
	RegisterXactCallback(xact_callback, NULL);
	batch_context = AllocSetContextCreate(TopMemoryContext,
										  "statbuffer batch",
										  ALLOCSET_DEFAULT_SIZES);

	started = GetCurrentTimestamp();
	remove_dropped_buffers();

	worker_loop();
	log_discarded(true);

	/* one that was stopped needs no memory for idle keys at all */
	if (shared != NULL && buffer != NULL && shared->nidle > 0)
	{
		TimestampTz now = GetCurrentTimestamp();

		reap(now, pg_atomic_read_u32(&shared->parked) != 0 ? now :
			 now - (int64) buffer->options.timeout * 1000);
	}
	proc_exit(0);
}
