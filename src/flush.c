/*-------------------------------------------------------------------------
 *
 * flush.c
 *	  One flush: from due keys to stored counts.
 *
 * A flush takes a batch of due keys, delivers it to the sink, and commits.
 * Before that it rereads the buffer's definition if it has changed.  This file
 * also decides what happens to keys that fail.
 *
 * A batch belongs to a transaction from the moment it is taken.  The
 * transaction's callbacks commit or restore it, while interrupts are held.  So
 * no count is lost or stored twice, however the transaction ends.
 *
 * If a batch fails, its keys are due again at once.  If it is not known which
 * key is to blame, all of them are suspects: they are retried in batches of
 * their own, of half the size, until the one that fails is alone.  It backs
 * off, and the others are stored.
 *
 * A batch that takes longer than the buffer's option "batch_time" is cut short
 * before the next call of the handler: what was stored is committed, and the
 * keys that are left are due again at once.  How many keys are taken is chosen
 * so that this is rare: see pace.c.
 *
 * Only a worker calls these functions, for the buffer that it has claimed.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/namespace.h"
#include "common/int.h"
#include "compat.h"
#include "convert.h"
#include "durable.h"
#include "flush.h"
#include "key.h"
#include "miscadmin.h"
#include "owner.h"
#include "pgstat.h"
#include "session.h"
#include "sink.h"
#include "storage/lmgr.h"
#include "utils/backend_status.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"

/* backoff is constant for this many attempts */
#define STEADY_ATTEMPTS			3
#define BACKOFF_MAX_MSECS		60000

/* the backoff before the definition is known */
#define UNKNOWN_BACKOFF_MSECS	1000

/*
 * Up to this many deadlocks and serialization failures in a row do not count
 * as failures.  The first is followed by a pause of a millisecond, each other
 * one by a pause twice as long.
 */
#define CONFLICTS_MAX			10

/*
 * A flush that was cancelled is retried after this time, or the buffer's
 * backoff if that is less.  After this many in a row, a cancel is a failure
 * like any other: it may be the handler that does it.
 */
#define CANCEL_PAUSE_MSECS		1000
#define CANCELS_MAX				3

/*
 * The pause before we check again whether we can remove a buffer whose
 * relation is gone, while another session still has a lock on it.
 */
#define GONE_PAUSE_MSECS		100

/*
 * After a failure was logged, the same one is logged again after
 * LOG_AGAIN_MSECS at the earliest, and a different one after LOG_OTHER_MSECS.
 */
#define LOG_AGAIN_MSECS			60000
#define LOG_OTHER_MSECS			1000

StaticAssertDecl(offsetof(SharedCounter, key) % sizeof(int) == 0,
				 "keys must be aligned for key_deform_in_place()");

/* The work of one transaction: see attempt(). */
typedef void (*FlushStep) (FlushState *flush, ClockTime now);

/* ------------------------------------------------------------------------
 * Failures
 * ------------------------------------------------------------------------
 */

/* Get the base of the backoff, in milliseconds. */
static int
get_backoff(FlushState *flush)
{
	return flush->buffer ? flush->buffer->options.backoff :
		UNKNOWN_BACKOFF_MSECS;
}

/* When to try again after this many failures in a row. */
static ClockTime
retry_time(FlushState *flush, int failures)
{
	int			backoff = get_backoff(flush);

	return clock_add(clock_now(),
					 clock_double(backoff, failures - STEADY_ATTEMPTS,
								  Max(backoff, BACKOFF_MAX_MSECS)));
}

/*
 * Log a failure, unless this or an earlier worker of the buffer has just
 * logged one: see LOG_AGAIN_MSECS.
 */
static void
log_failure(FlushState *flush, ErrorData *edata, int nkeys)
{
	SharedFlush *log = &flush->shared->flush;
	ClockTime	now = clock_now();
	uint64		suppressed = log->suppressed;

	if (!clock_limit(&log->logged_at, now,
					 edata->sqlerrcode == log->logged_sqlstate ?
					 LOG_AGAIN_MSECS : LOG_OTHER_MSECS))
	{
		log->suppressed++;
		return;
	}
	log->logged_sqlstate = edata->sqlerrcode;
	log->suppressed = 0;

	ereport(LOG,
			(errcode(edata->sqlerrcode),
			 flush->buffer == NULL ?
			 errmsg("could not flush buffer %u: %s", flush->relid, edata->message) :
			 nkeys > 0 ?
			 errmsg_plural("could not flush %d key of buffer \"%s\": %s",
						   "could not flush %d keys of buffer \"%s\": %s",
						   nkeys, nkeys, NameStr(flush->buffer->name),
						   edata->message) :
			 errmsg("could not flush buffer \"%s\": %s",
					NameStr(flush->buffer->name), edata->message),
			 edata->detail ? errdetail_internal("%s", edata->detail) : 0,
			 edata->hint ? errhint("%s", edata->hint) : 0,
			 edata->context ? errcontext("%s", edata->context) : 0,
			 suppressed > 0 ?
			 errcontext(ngettext("%llu failure since the last such message",
								 "%llu failures since the last such message",
								 (unsigned long) suppressed),
						(unsigned long long) suppressed) : 0));
}

/*
 * Log the sum of the counts that were discarded, unless this or an earlier
 * worker of the buffer has logged one within LOG_AGAIN_MSECS.  Then it is logged
 * later, at the latest when a worker of the buffer ends (`at_once').
 */
void
flush_log_discarded(FlushState *flush, bool at_once)
{
	SharedFlush *log;

	/* the buffer is gone, or its name is not known */
	if (flush->shared == NULL || flush->buffer == NULL)
		return;
	log = &flush->shared->flush;
	log->discarded += (uint64) flush->batch.discarded;
	log->any_discarded |= flush->batch.discarded != 0;
	flush->batch.discarded = 0;
	if (!log->any_discarded)
		return;
	if (!clock_limit(&log->discarded_logged_at, clock_now(),
					 at_once ? 0 : LOG_AGAIN_MSECS))
		return;

	ereport(LOG,
			(errmsg("discarded counts of buffer \"%s\": " INT64_FORMAT,
					NameStr(flush->buffer->name), (int64) log->discarded),
			 errdetail("The handler failed, and the buffer's option \"restart\" is \"temporary\".")));
	log->discarded = 0;
	log->any_discarded = false;
}

/* A key has failed: decide what happens to one of its items. */
static void
fail_item(FlushState *flush, BatchItem *item)
{
	if (item->count == 0)
		return;
	item->outcome = flush->buffer->options.temporary ? BATCH_DISCARD :
		BATCH_BACK_OFF;
	item->retry_at = retry_time(flush, item->ref.counter->failures + 1);
}

/*
 * Before the transaction is rolled back: decide what happens to each key of
 * the batch.  Returns whether a key has failed, and the failure must be
 * reported.
 */
static bool
classify_failure(FlushState *flush, ErrorData *edata)
{
	CounterBatch *batch = &flush->batch;
	SharedFlush *shared = &flush->shared->flush;

	/*
	 * A conflict with others does not count as a failure, up to a limit.  The
	 * other process has been woken by now, but may not be running yet: it
	 * must have time to take the lock that we are about to take again.
	 */
	if (ERRCODE_TO_CATEGORY(edata->sqlerrcode) == ERRCODE_TRANSACTION_ROLLBACK &&
		shared->conflicts < CONFLICTS_MAX)
	{
		flush->paused_until = clock_add(clock_now(), 1 << shared->conflicts);
		shared->conflicts++;
		return false;
	}
	shared->conflicts = 0;

	batch->mix_failing = false;
	if (batch->nkept == 1)
	{
		for (int i = 0; i < batch->nitems; i++)
			fail_item(flush, &batch->items[i]);
		return true;
	}
	if (flush->current_key >= 0 && flush->current_nkeys == 1)
	{
		FlushKey   *key = &flush->keys[flush->current_key];

		for (int i = 0; i < key->nitems; i++)
			fail_item(flush, &batch->items[flush->items[key->first_item + i]]);
		return true;
	}

	/* which key is to blame is not known: it will in the end fail alone */
	for (int i = 0; i < batch->nitems; i++)
		if (batch->items[i].count != 0)
			batch->items[i].outcome = BATCH_SUSPECT;
	batch->suspect_limit = Max(batch->nkept / 2, 1);
	return false;
}

/*
 * In PG_CATCH: copy the error, and roll the transaction back.  Returns the
 * error if it must be reported.
 */
static ErrorData *
roll_back(FlushState *flush)
{
	ErrorData  *edata;
	SessionEnd	end;
	bool		report = true;

	MemoryContextSwitchTo(flush->context);
	edata = CopyErrorData();
	FlushErrorState();

	HOLD_INTERRUPTS();
	end = session_stop_watching();
	if (end.timed_out && edata->sqlerrcode == ERRCODE_QUERY_CANCELED)
		edata->message = psprintf("handler did not return within %d ms",
								  flush->buffer->options.handler_timeout);
	if (flush->shared != NULL)
		requests_set_locked_out(&flush->shared->requests, false);
	if (edata->sqlerrcode == ERRCODE_AMBIGUOUS_COLUMN && edata->hint == NULL)
		edata->hint = _("If it is an argument of the handler, give that another name, such as \"p_key\".");
	flush->nfailed = flush->preparing || flush->batch.nitems == 0 ? 0 :
		flush->batch.nkept;
	flush->preparing = false;
	if (end.cancelled && !end.timed_out &&
		edata->sqlerrcode == ERRCODE_QUERY_CANCELED &&
		flush->shared != NULL &&
		(end.halted || flush->shared->flush.cancels < CANCELS_MAX))
	{
		flush->paused_until = clock_add(clock_now(),
										Min(get_backoff(flush), CANCEL_PAUSE_MSECS));
		/* that a buffer is stopped says nothing about its handler */
		if (!end.halted)
			flush->shared->flush.cancels++;
		report = false;
	}
	else if (flush->nfailed > 0)
		report = classify_failure(flush, edata);
	RESUME_INTERRUPTS();

	AbortOutOfAnyTransaction();
	LWLockReleaseAll();
	MemoryContextSwitchTo(flush->context);
	return report ? edata : NULL;
}

/* When is the first of the keys that failed tried again?  0: none is. */
static ClockTime
first_retry(const CounterBatch *batch)
{
	ClockTime	first = SCHEDULE_NEVER;

	for (int i = 0; i < batch->ntaken; i++)
		if (batch->items[i].outcome == BATCH_BACK_OFF)
			first = Min(first, batch->items[i].retry_at);
	return first == SCHEDULE_NEVER ? 0 : first;
}

/* After a transaction has failed: record the failure and log it. */
static void
report_failure(FlushState *flush, ErrorData *edata)
{
	SharedBuffer *shared = flush->shared;
	BufferFailure failure;

	if (edata == NULL || shared == NULL)
		return;
	failure.message = edata->message;
	failure.detail = edata->detail;
	failure.hint = edata->hint;
	failure.broken = flush->nfailed == 0;
	if (failure.broken)
	{
		/* the buffer itself has failed, not a key */
		shared->flush.breakdowns++;
		flush->paused_until = retry_time(flush, shared->flush.breakdowns);
		failure.retry_at = flush->paused_until;
	}
	else
		failure.retry_at = first_retry(&flush->batch);

	/* first: where a key shows its error, the buffer shows it, too */
	registry_set_failure(shared, &failure);
	if (failure.broken)
		registry_count(shared, STAT_FAILURES, 1);
	else
	{
		/* without the detail: keys that fail for the same reason share it */
		batch_tidy(&flush->batch, flush->batch.ntaken,
				   edata->hint == NULL ? edata->message :
				   psprintf("%s\nHINT:  %s", edata->message, edata->hint));
	}
	log_failure(flush, edata, flush->nfailed);
}

/* ------------------------------------------------------------------------
 * Transactions
 * ------------------------------------------------------------------------
 */

static void
xact_callback(XactEvent event, void *arg)
{
	FlushState *flush = arg;

	if (event == XACT_EVENT_PRE_COMMIT)
		batch_prepare_commit(&flush->batch);
	else if (event == XACT_EVENT_COMMIT)
		batch_commit(&flush->batch);
	else if (event == XACT_EVENT_ABORT)
		batch_restore(&flush->batch);
}

/*
 * Do a step in a transaction.  If it raises an error, this reports it and
 * returns false.
 */
static bool
attempt(FlushState *flush, FlushStep step, ClockTime now, bool cancellable)
{
	ErrorData  *volatile error = NULL;
	volatile bool succeeded = false;

	MemoryContextReset(flush->context);
	flush->keys = NULL;
	flush->items = NULL;
	flush->nkeys = 0;
	flush->current_key = -1;
	flush->usecs = 0;
	PG_TRY();
	{
		session_begin_transaction(cancellable);
		step(flush, now);
		session_commit_transaction();
		succeeded = true;
	}
	PG_CATCH();
	{
		error = roll_back(flush);
	}
	PG_END_TRY();
	session_end_transaction();
	report_failure(flush, error);
	return succeeded;
}

/* ------------------------------------------------------------------------
 * The definition
 * ------------------------------------------------------------------------
 */

/*
 * The buffer being opened, for lock_relation(): a BufferLocker has no argument
 * for it.
 */
static SharedRequests *locking_requests = NULL;

/*
 * Lock the buffer's relation, or that of a row type of its keys: a
 * BufferLocker.  If another session has locked it, or waits to, the sessions
 * that wait for a drain are woken: that session may be waiting for one of
 * them.
 */
static void
lock_relation(Oid relid, LOCKMODE lockmode)
{
	if (ConditionalLockRelationOid(relid, lockmode))
		return;
	requests_set_locked_out(locking_requests, true);
	LockRelationOid(relid, lockmode);
	requests_set_locked_out(locking_requests, false);
}

/*
 * Wait at the gate for sb_stop() or sb_start().  A flush does this before it
 * locks the relation, so that a worker that waits here has no lock that could
 * block the transaction that it waits for.
 */
static void
pass_gate(FlushState *flush)
{
	LOCKTAG		gate;

	buffer_set_gate_tag(&gate, flush->relid);
	if (LockAcquire(&gate, ShareLock, false, true) != LOCKACQUIRE_NOT_AVAIL)
		return;
	requests_set_locked_out(&flush->shared->requests, true);
	(void) LockAcquire(&gate, ShareLock, false, false);
	requests_set_locked_out(&flush->shared->requests, false);
}

/*
 * The relation is gone: begin to remove the buffer, unless another session has
 * a lock on it.  A session that still counts in the buffer, or that has created
 * it and not committed, has such a lock: see buffer_lock_for_transaction().
 */
static void
drop_buffer(FlushState *flush)
{
	if (!ConditionalLockRelationOid(flush->relid, AccessExclusiveLock))
	{
		flush->paused_until = clock_add(clock_now(), GONE_PAUSE_MSECS);
		return;
	}
	registry_begin_drop(flush->shared, false);
	flush->leaving = true;
}

/*
 * May this process still run the handler?  If not, it must not continue with
 * the rights that it has.
 */
static bool
is_owner(FlushState *flush, Oid known_owner)
{
	if (flush->buffer->owner == GetSessionUserId())
		return session_is_valid();

	/* the launcher did not know this owner: let its worker start at once */
	if (flush->buffer->owner != known_owner)
		registry_start_after(flush->shared, 0);
	return false;
}

/* Apply the options that the worker and the schedule use. */
static void
apply_definition(FlushState *flush)
{
	SharedBuffer *shared = flush->shared;
	SbBuffer   *buffer = flush->buffer;
	ClockTime	now = clock_now();

	session_set_shutdown(buffer->options.shutdown);

	/* a new interval also applies to scheduled keys */
	schedule_set_interval(&shared->schedule,
						  (int64) buffer->options.interval * 1000, now);

	/* keys that did not fit the key columns may fit them now */
	if (shared->flush.seen_shape != buffer->table.shape ||
		shared->flush.seen_shapes != buffer->table.shapes_number)
	{
		shared->flush.seen_shapes = buffer->table.shapes_number;
		shared->flush.seen_shape = buffer->table.shape;
		schedule_retry(&shared->schedule);
	}
	batch_set_size(&flush->batch, buffer->options.batch_size);
}

/*
 * Within a transaction: pass the gate, lock the relation in RowShareLock, and
 * open the definition.  Returns false if there is nothing to flush, or not by
 * this process.
 *
 * Raises an error if the buffer cannot work as it is defined.
 */
static bool
open_definition(FlushState *flush)
{
	Oid			known_owner = pg_atomic_read_u32(&flush->shared->settings.owner);
	SbBuffer   *opened;
	BufferSettings settings;

	locking_requests = &flush->shared->requests;
	pass_gate(flush);
	lock_relation(flush->relid, RowShareLock);
	if (!SearchSysCacheExists1(RELOID, ObjectIdGetDatum(flush->relid)))
	{
		drop_buffer(flush);
		return false;
	}

	opened = buffer_open_locked(flush->relid, lock_relation);
	buffer_attach_worker(opened);
	flush->buffer = opened;
	session_set_shutdown(opened->options.shutdown);
	if (!is_owner(flush, known_owner))
	{
		flush->leaving = true;
		return false;
	}

	buffer_get_settings(opened, &settings);
	registry_set(flush->shared, &settings);
	apply_definition(flush);
	if (opened->options.stopped)
	{
		flush->leaving = true;
		ConditionVariableBroadcast(&shared_control->drain_cv);
	}
	return !opened->options.stopped;
}

/* The step of flush_check_definition(). */
static void
check_definition(FlushState *flush, ClockTime now)
{
	bool		is_new = !flush->is_used;

	if (!open_definition(flush))
	{
		/* it was read, and says that this worker has nothing to do here */
		if (flush->leaving)
			flush->unread = false;
		return;
	}
	flush->is_used = true;
	pgstat_report_activity(STATE_IDLE, NameStr(flush->buffer->name));
	if (!is_new &&
		strcmp(owner_search_path(flush->buffer->owner),
			   GetConfigOptionResetString("search_path")) != 0)
	{
		registry_start_after(flush->shared, 0);
		requests_ask(&flush->shared->requests, REQUEST_RECHECK);
		flush->leaving = true;
	}

	/* last, for the search path may not be readable, either */
	flush->unread = false;
}

/* ------------------------------------------------------------------------
 * Flushing
 * ------------------------------------------------------------------------
 */

static inline void *
allocate(Size n, Size size)
{
	return palloc_extended(n * size, MCXT_ALLOC_HUGE);
}

/*
 * Sort the batch by key, and merge keys that are equal by the order of their
 * types.  The keys' values may be in shared memory: a counter in flight is not
 * freed.
 */
static void
arrange_batch(FlushState *flush)
{
	TupleDesc	desc = flush->buffer->shape->desc;
	int			n = flush->batch.nitems;
	BatchItem  *items = flush->batch.items;
	Datum	   *values = allocate((Size) n * desc->natts, sizeof(Datum));
	bool	   *isnull = allocate((Size) n * desc->natts, sizeof(bool));
	bool	   *same = allocate(n, sizeof(bool));
	FlushKey   *keys = allocate(n, sizeof(FlushKey));
	int			nkeys = 0;

	for (int i = 0; i < n; i++)
		key_deform_in_place(desc, items[i].ref.counter->key,
							items[i].ref.counter->keylen,
							&values[(Size) i * desc->natts],
							&isnull[(Size) i * desc->natts]);
	flush->items = allocate(n, sizeof(int));
	flush->keys = keys;
	key_sort(desc, values, isnull, n, flush->items, same);
	for (int i = 0; i < n; i++)
	{
		int			item = flush->items[i];
		FlushKey   *key;

		if (same[i])
		{
			int64		sum;

			/* what takes the sum out of range is left for the next batch */
			key = &keys[nkeys - 1];
			if (pg_add_s64_overflow(key->key.count, items[item].count, &sum))
				batch_pass_over(&flush->batch, item);
			else
				key->key.count = sum;
			key->nitems++;
			continue;
		}
		key = &keys[nkeys++];
		key->key.values = &values[(Size) item * desc->natts];
		key->key.isnull = &isnull[(Size) item * desc->natts];
		key->key.count = items[item].count;
		key->first_item = i;
		key->nitems = 1;
	}

	/* there is nothing to store for counts that add up to 0 */
	flush->nkeys = 0;
	flush->sink_keys = allocate(n, sizeof(SinkKey));
	for (int i = 0; i < nkeys; i++)
	{
		if (keys[i].key.count == 0)
			continue;
		keys[flush->nkeys] = keys[i];
		flush->sink_keys[flush->nkeys++] = keys[i].key;
	}
}

/*
 * Must the batch, which has stored something, be cut short?
 *
 * If the worker must end soon, half of the time that there was for that when
 * the batch began is left for committing: what is not committed by then is
 * rolled back.
 */
static bool
time_is_up(FlushState *flush, ClockTime now)
{
	int			batch_time = flush->buffer->options.batch_time;
	ClockTime	stops_at = session_stops_at();

	if (batch_time == 0)
		return false;
	return clock_passed(flush->began, now, batch_time) ||
		(stops_at != 0 && now - flush->began >= stops_at - now);
}

/* Called by the sink before it stores keys: a SinkProgress. */
static bool
begin_call(int first_key, int nkeys, void *arg)
{
	FlushState *flush = arg;
	ClockTime	now = clock_now();

	if (first_key == 0)
		flush->began = now;
	else if (time_is_up(flush, now))
		return false;
	session_begin_handler(flush->buffer->options.handler_timeout);
	flush->current_key = first_key;
	flush->current_nkeys = nkeys;
	registry_count(flush->shared, STAT_HANDLER_CALLS, 1);
	return true;
}

/* The keys that were not delivered are left for the next batch. */
static void
leave_rest(FlushState *flush)
{
	if (flush->ndelivered == flush->nkeys)
		return;
	for (int i = flush->ndelivered; i < flush->nkeys; i++)
	{
		FlushKey   *key = &flush->keys[i];

		for (int j = 0; j < key->nitems; j++)
			flush->batch.items[flush->items[key->first_item + j]].later = true;
	}
	batch_pass_over_later(&flush->batch);
}

/* Deliver the batch to the sink. */
static void
deliver(FlushState *flush)
{
	SinkSource	source;
	Sink	   *sink;

	buffer_get_source(flush->buffer, &source);
	flush->preparing = true;
	sink = sink_for(source.options)->prepare(&source);
	flush->preparing = false;
	pgstat_report_activity(STATE_RUNNING,
						   psprintf(ngettext("%s: flushing %d key",
											 "%s: flushing %d keys",
											 flush->batch.nitems),
									NameStr(flush->buffer->name),
									flush->batch.nitems));
	arrange_batch(flush);
	if (flush->nkeys == 0)
		return;
	flush->ndelivered = sink->methods->deliver(sink, flush->sink_keys,
											   flush->nkeys, begin_call,
											   flush);
	session_end_handler();
	flush->current_key = -1;
	flush->usecs = Max(clock_now() - flush->began, 1);
	leave_rest(flush);
	CHECK_FOR_INTERRUPTS();
}

/* A count that was discarded, followed by the key's stored form. */
typedef struct DiscardedKey
{
	uint64		epoch;
	int64		count;
	uint16		len;
} DiscardedKey;

/*
 * The batch is of a durable buffer: look up the epochs of its keys.  Before it is
 * delivered, because if that fails, and counts are discarded, the buffer may get
 * other epochs before we have told the ledger.
 */
static void
find_epochs(FlushState *flush)
{
	uint32		known = 0;

	flush->preparing = true;
	for (int i = 0; i < flush->batch.nitems; i++)
	{
		int			shape = flush->batch.items[i].ref.counter->shape;

		if ((known & (uint32) 1 << shape) != 0)
			continue;
		flush->epochs[shape] =
			durable_epoch(flush->buffer,
						  table_copy_shape(&flush->shared->table, shape));
		known |= (uint32) 1 << shape;
	}
}

/* Append to the ledger that the counts of the batch are no longer held. */
static void
append_taken(FlushState *flush)
{
	CounterBatch *batch = &flush->batch;
	LedgerBody *bodies[TABLE_SHAPES] = {NULL};
	LedgerWriter writer;

	flush->preparing = true;
	ledger_open_current(&writer, false);
	for (int i = 0; i < batch->nitems; i++)
	{
		BatchItem  *item = &batch->items[i];
		SharedCounter *counter = item->ref.counter;

		if (item->count == 0)
			continue;
		if (bodies[counter->shape] == NULL)
		{
			bodies[counter->shape] = palloc(sizeof(LedgerBody));
			ledger_begin_body(bodies[counter->shape],
							  flush->epochs[counter->shape]);
		}
		ledger_put(&writer, bodies[counter->shape], counter->key,
				   counter->keylen, (int64) (0 - (uint64) item->count));
	}
	for (int i = 0; i < TABLE_SHAPES; i++)
		if (bodies[i] != NULL)
			ledger_end_body(&writer, bodies[i]);
	ledger_close(&writer);
	flush->preparing = false;
}

/*
 * After a batch has failed: note what was discarded, for the ledger still has
 * it.
 */
static void
note_discards(FlushState *flush)
{
	CounterBatch *batch = &flush->batch;

	if (!flush->buffer->options.durable)
		return;
	for (int i = 0; i < batch->ntaken; i++)
	{
		BatchItem  *item = &batch->items[i];
		SharedCounter *counter = item->ref.counter;
		DiscardedKey key = {.count = item->count};

		if (item->outcome != BATCH_DISCARD || item->count == 0)
			continue;
		key.epoch = flush->epochs[counter->shape];
		key.len = counter->keylen;
		appendBinaryStringInfo(&flush->discards, (char *) &key, sizeof(key));
		appendBinaryStringInfo(&flush->discards, counter->key,
							   KEY_LENGTH(counter->keylen));
	}
}

/*
 * The step of append_discards().  It needs no lock on the buffer: if its epochs
 * have changed meanwhile, what is appended is nobody's.
 */
static void
append_discarded(FlushState *flush, ClockTime now)
{
	const char *next = flush->discards.data;
	LedgerBody *body = palloc(sizeof(LedgerBody));
	LedgerWriter writer;

	ledger_open_current(&writer, false);
	ledger_begin_body(body, 0);
	while (next < flush->discards.data + flush->discards.len)
	{
		DiscardedKey key;

		memcpy(&key, next, sizeof(key));
		next += sizeof(key);
		if (key.epoch != body->epoch)
		{
			ledger_end_body(&writer, body);
			ledger_begin_body(body, key.epoch);
		}
		ledger_put(&writer, body, next, key.len, (int64) (0 - (uint64) key.count));
		next += KEY_LENGTH(key.len);
	}
	ledger_end_body(&writer, body);
	ledger_close(&writer);
}

/*
 * Tell the ledger what was discarded.  If that fails, it is tried again with the
 * next batch; if the server crashes before, the counts are attempted once
 * more.
 */
static void
append_discards(FlushState *flush)
{
	if (flush->discards.len > 0 &&
		attempt(flush, append_discarded, 0, false))
		resetStringInfo(&flush->discards);
}

/* The step of flush_batch(). */
static void
take_and_deliver(FlushState *flush, ClockTime now)
{
	BufferUse	use;
	int			max_keys;

	if (!open_definition(flush))
		return;
	max_keys = flush->batch.size;
	if (flush->buffer->options.batch_time > 0)
		max_keys = pace_limit(&flush->shared->flush.pace, max_keys);

	/* keep the handler from altering the buffer and its row types */
	buffer_begin_use(flush->buffer, &use);
	PushActiveSnapshot(GetTransactionSnapshot());
	MemoryContextSwitchTo(flush->context);
	if (batch_take(&flush->batch, &flush->buffer->table, max_keys, now, clock_add(now, BACKOFF_MAX_MSECS)) > 0)
	{
		if (flush->buffer->options.durable)
			find_epochs(flush);
		deliver(flush);
		if (flush->buffer->options.durable)
			append_taken(flush);
		flush->shared->flush.breakdowns = 0;
		registry_clear_error(flush->shared);
	}
	PopActiveSnapshot();
	buffer_end_use(&use);
}

/* The step of reset_session(). */
static void
drop_temporary(FlushState *flush, ClockTime now)
{
	PushActiveSnapshot(GetTransactionSnapshot());
	ResetTempTableNamespace();
	PopActiveSnapshot();
}

/* Undo what the handler has changed in the session. */
static void
reset_session(FlushState *flush)
{
	if (session_reset() && !attempt(flush, drop_temporary, 0, false))
		flush->leaving = true;
}

/* ------------------------------------------------------------------------
 * Altered key columns
 * ------------------------------------------------------------------------
 */

/* A key cannot be converted: a ConvertFailed. */
static void
key_failed(SharedCounter *counter, const char *message, void *arg)
{
	FlushState *flush = arg;
	char	   *error;

	error = psprintf(_("could not convert the key to the altered key columns: %s"),
					 message);
	batch_fail_unreadable(flush->shared, counter, error);
	pfree(error);
}

/* The step of convert_unreadable(). */
static void
convert_rest_of_keys(FlushState *flush, ClockTime now)
{
	SharedFlush *shared = &flush->shared->flush;
	CounterTable *table;

	if (!open_definition(flush))
		return;
	table = &flush->buffer->table;
	MemoryContextSwitchTo(flush->context);
	convert_rest(flush->buffer, lock_relation, key_failed, flush,
				 &flush->converted);
	shared->converted_shapes = table->shapes_number;
	shared->converted_shape = table->shape;
}

/* Record and log that there are keys that do not fit the key columns. */
static void
report_unreadable(FlushState *flush)
{
	ErrorData	error = {
		.sqlerrcode = ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
		.message = _("some keys were counted before the key columns were altered"),
		.detail = psprintf(_("The first one cannot be converted: %s"),
						   flush->converted.message),
		.hint = _("Alter the columns back to have the keys stored, or discard them with TRUNCATE.")
	};
	BufferFailure failure = {
		.message = error.message,
		.detail = error.detail,
		.hint = error.hint,
		.retry_at = clock_add(clock_now(), BACKOFF_MAX_MSECS)
	};

	registry_set_failure(flush->shared, &failure);
	log_failure(flush, &error, (int) Min(flush->converted.nfailed, INT_MAX));
}

/*
 * Convert the keys that cannot be read, if a batch has found such keys that are
 * due, or if the key columns were altered since that was last done.  Returns
 * whether that may have run code of users.
 */
static bool
convert_unreadable(FlushState *flush)
{
	SharedFlush *shared;
	CounterTable *table;
	bool		due = flush->batch.nunreadable > 0;

	flush->batch.nunreadable = 0;
	if (flush->leaving || flush->shared == NULL || flush->buffer == NULL ||
		flush->buffer->shared != flush->shared)
		return false;
	shared = &flush->shared->flush;
	table = &flush->buffer->table;
	if (!due && registry_is_converted(flush->shared, table))
		return false;
	if (!table_has_unreadable(&flush->shared->table, table))
	{
		shared->converted_shapes = table->shapes_number;
		shared->converted_shape = table->shape;
		return false;
	}
	flush->converted.nfailed = 0;
	if (attempt(flush, convert_rest_of_keys, 0, true) &&
		flush->converted.nfailed > 0)
		report_unreadable(flush);
	return true;
}

/*
 * Check the definition, outside of a flush.  If a new session of the owner
 * would look for the handler elsewhere than this one, which has the settings
 * with which it started, the worker leaves and another one takes its place.
 *
 * Reports errors instead of raising them.  After one, or if the relation is
 * gone but still locked, the definition remains unread, and the caller must
 * try again when the pause is over: nobody may ask for it again.
 */
void
flush_check_definition(FlushState *flush)
{
	flush->unread = true;
	if (!attempt(flush, check_definition, 0, true) || flush->unread)
		return;
	if (convert_unreadable(flush) && !flush->leaving)
		reset_session(flush);
}

/*
 * Flush up to a batch of due keys in one transaction.  Reports errors of user
 * code and definitions instead of raising them.
 */
void
flush_batch(FlushState *flush, ClockTime now)
{
	CounterBatch *batch = &flush->batch;

	batch->ntaken = 0;
	if (attempt(flush, take_and_deliver, now, true) && batch->ntaken > 0)
	{
		flush->shared->flush.conflicts = 0;
		flush->shared->flush.cancels = 0;
		batch_tidy(batch, batch->ntaken, NULL);
		if (batch->had_suspects)
			batch->suspect_limit = Min((int64) batch->suspect_limit * 2,
									   batch->size);
		batch->mix_failing = batch->mix_failing || batch->had_failing;
		if (flush->usecs > 0)
			pace_note(&flush->shared->flush.pace, batch->nkept, flush->usecs,
					  (int64) flush->buffer->options.batch_time * 1000,
					  flush->ndelivered < flush->nkeys);
	}
	else if (batch->ntaken > 0)
		note_discards(flush);
	if (unlikely(flush->discards.len > 0))
		append_discards(flush);
	flush_log_discarded(flush, false);
	(void) convert_unreadable(flush);

	if (!flush->leaving)
		reset_session(flush);
	pgstat_report_stat(false);
	if (flush->buffer != NULL)
		pgstat_report_activity(STATE_IDLE, NameStr(flush->buffer->name));
}

/* ------------------------------------------------------------------------
 * Coming and going
 * ------------------------------------------------------------------------
 */

/*
 * The process has claimed a buffer, and is its worker.  Must be called before
 * it connects to the database, and again when it passes on to another buffer.
 * Cannot fail.
 */
void
flush_begin(FlushState *flush, SharedBuffer *shared)
{
	Assert(!flush->leaving);
	flush->relid = shared->key.relid;
	flush->shared = shared;
	flush->buffer = NULL;
	flush->unread = true;
	flush->paused_until = 0;
	flush->preparing = false;
	batch_begin(&flush->batch, shared);
	session_begin(shared);
}

/* The process has connected.  Must be called once. */
void
flush_set_connected(FlushState *flush)
{
	MemoryContext oldcontext;

	session_set_connected();
	RegisterXactCallback(xact_callback, flush);
	flush->context = AllocSetContextCreate(TopMemoryContext,
										   "statbuffer batch",
										   ALLOCSET_DEFAULT_SIZES);
	oldcontext = MemoryContextSwitchTo(TopMemoryContext);
	initStringInfo(&flush->discards);
	MemoryContextSwitchTo(oldcontext);
}

/*
 * The process ends, and has rolled back its transaction.  It does not access
 * the buffer after this.
 */
void
flush_end(FlushState *flush)
{
	session_end();
	Assert(flush->batch.nitems == 0);
}
