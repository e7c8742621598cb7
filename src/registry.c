/*-------------------------------------------------------------------------
 *
 * registry.c
 *	  Buffers as all processes see them: make, find, list, claim, remove.
 *
 * The registry is a dshash table of SharedBuffer, whose parts belong to other
 * rooms: the table of counters to table.c, the schedule to schedule.c, the
 * requests to requests.c, the state of flushes to flush.c.  What is left is
 * this room's: the settings, the worker's slot, the totals, and the claims.
 *
 * At most one process acts as a buffer's worker: it has claimed the buffer.
 * When all claims are gone and the server is about to stop, the launcher closes
 * the registry, and counts become final; see SharedClaims.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "compat.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "registry.h"
#include "utils/memutils.h"

/* delay before a worker that failed is replaced */
#define WORKER_FAILED_MSECS		1000

/* the least time between two warnings of a buffer in the log */
#define WARN_MSECS				(60 * 1000)

static dshash_table *registry = NULL;

/*
 * the buffers that this process has claimed: a worker's own, and another one,
 * which it removes or passes on to
 */
static SharedBuffer *claims[2];

/*
 * Attach this process to the area and the registry for the rest of its life.
 * With `create', they are created if necessary; without, returns false if
 * there are none.
 *
 * Raises an error if memory is out.  Takes SharedControl.lock.
 */
bool
registry_attach(bool create)
{
	if (likely(registry != NULL))
		return true;
	if (!shmem_attach(create))
		return false;
	registry = shmem_attach_table(&shared_control->registry, sizeof(SharedBufferKey),
								  sizeof(SharedBuffer), create);
	return registry != NULL;
}

/* ------------------------------------------------------------------------
 * Finding
 * ------------------------------------------------------------------------
 */

/*
 * Find a buffer and lock its partition of the registry, so that it is not
 * removed until registry_unlock() is called.  Returns NULL, without a lock, if
 * it does not exist.
 */
SharedBuffer *
registry_lock(const SharedBufferKey *key)
{
	return dshash_find(registry, key, false);
}

/* Release the lock that registry_lock() took. */
void
registry_unlock(SharedBuffer *buffer)
{
	dshash_release_lock(registry, buffer);
}

/*
 * Find a buffer, or return NULL if it does not exist.  The caller holds a lock
 * on the relation or has claimed the buffer, so that it is not removed.  Locks
 * the partition of the registry for a moment.
 */
SharedBuffer *
registry_find(Oid dboid, Oid relid)
{
	SharedBufferKey key = {dboid, relid};
	SharedBuffer *buffer = registry_lock(&key);

	if (buffer != NULL)
		registry_unlock(buffer);
	return buffer;
}

/* Begin a scan of all buffers. */
void
registry_begin_scan(RegistryScan *scan)
{
	dshash_seq_init(&scan->status, registry, false);
}

/* Get the next buffer, with its partition locked, or NULL at the end. */
SharedBuffer *
registry_next(RegistryScan *scan)
{
	return dshash_seq_next(&scan->status);
}

/* End a scan, and release its lock. */
void
registry_end_scan(RegistryScan *scan)
{
	dshash_seq_term(&scan->status);
}

/* ------------------------------------------------------------------------
 * Making
 * ------------------------------------------------------------------------
 */

static void
settings_init(SharedSettings *shared, const BufferSettings *settings)
{
	pg_atomic_init_u32(&shared->owner, settings->owner);
	pg_atomic_init_u32(&shared->stopped, settings->stopped);
	pg_atomic_init_u32(&shared->provisional, settings->provisional);
	pg_atomic_init_u32(&shared->dropped, 0);
	pg_atomic_init_u32(&shared->durable, settings->durable);
	pg_atomic_init_u64(&shared->interval, (uint64) settings->interval);
	pg_atomic_init_u64(&shared->jitter, (uint64) settings->jitter);
	pg_atomic_init_u64(&shared->max_memory, settings->max_memory);
}

static void
totals_init(SharedTotals *totals)
{
	pg_atomic_init_u64(&totals->in_flight, 0);
	pg_atomic_init_u64(&totals->last_flush, 0);
	for (int i = 0; i < STAT_COUNT; i++)
		pg_atomic_init_u64(&totals->stats[i], 0);
	pg_atomic_init_u64(&totals->warned_at, 0);
	LWLockInitialize(&totals->lock, shared_control->tranches.totals);
	totals->reset_at = GetCurrentTimestamp();
}

/*
 * Find a buffer, or create it with these settings; then sets `made'.
 *
 * The caller holds a lock on the relation, so that the buffer is not removed.
 * The launcher, which cannot lock the relation, must claim the buffer before
 * it accesses it.  Raises an error if memory is out.
 */
SharedBuffer *
registry_make(Oid dboid, Oid relid, const BufferSettings *settings, bool *made)
{
	SharedBufferKey key = {dboid, relid};
	SharedBuffer *buffer;
	dsa_pointer table;
	bool		found;

	*made = false;
	buffer = registry_find(dboid, relid);
	if (buffer != NULL)
		return buffer;

	/* first, because it can fail */
	table = table_create();
	PG_TRY();
	{
		buffer = dshash_find_or_insert(registry, &key, &found);
	}
	PG_CATCH();
	{
		/* dsa.c raises errors with its locks held, which freeing takes, too */
		LWLockReleaseAll();
		table_free(table);
		PG_RE_THROW();
	}
	PG_END_TRY();

	if (!found)
	{
		memset((char *) buffer + sizeof(SharedBufferKey), 0,
			   sizeof(SharedBuffer) - sizeof(SharedBufferKey));
		settings_init(&buffer->settings, settings);
		table_init(&buffer->table, table);
		requests_init(&buffer->requests);
		pg_atomic_init_u32(&buffer->in_flight.xid, InvalidTransactionId);
		pg_atomic_init_u32(&buffer->in_flight.ended, 0);
		totals_init(&buffer->totals);
		schedule_init(&buffer->schedule, settings->interval, clock_now());
		pg_atomic_init_u32(&buffer->ledger_loaded, 0);
	}
	registry_unlock(buffer);

	*made = !found;
	if (found)
		table_free(table);
	return buffer;
}

/*
 * Put the definition into force, for the launcher and for processes that
 * count.  SharedSettings says who may call this.  Takes no lock, cannot fail.
 */
void
registry_set(SharedBuffer *buffer, const BufferSettings *settings)
{
	SharedSettings *shared = &buffer->settings;

	/* avoid needless writes: other processes read the same cache line */
	if (pg_atomic_read_u32(&shared->owner) != settings->owner)
		pg_atomic_write_u32(&shared->owner, settings->owner);
	if (pg_atomic_read_u32(&shared->stopped) != (uint32) settings->stopped)
	{
		pg_atomic_write_u32(&shared->stopped, settings->stopped);

		/* what it holds may be due: it was not flushed while it was stopped */
		if (!settings->stopped)
			registry_wake(buffer);
	}
	if (pg_atomic_read_u32(&shared->provisional) != (uint32) settings->provisional)
		pg_atomic_write_u32(&shared->provisional, settings->provisional);
	if (pg_atomic_read_u32(&shared->durable) != (uint32) settings->durable)
		pg_atomic_write_u32(&shared->durable, settings->durable);
	if (pg_atomic_read_u64(&shared->interval) != (uint64) settings->interval)
		pg_atomic_write_u64(&shared->interval, (uint64) settings->interval);
	if (pg_atomic_read_u64(&shared->jitter) != (uint64) settings->jitter)
		pg_atomic_write_u64(&shared->jitter, (uint64) settings->jitter);
	if (pg_atomic_read_u64(&shared->max_memory) != settings->max_memory)
		pg_atomic_write_u64(&shared->max_memory, settings->max_memory);
}

/*
 * Set only the owner.  The caller holds a lock on the relation, or is just
 * committing.  Takes no lock, cannot fail.
 */
void
registry_set_owner(SharedBuffer *buffer, Oid owner)
{
	if (pg_atomic_read_u32(&buffer->settings.owner) != owner)
		pg_atomic_write_u32(&buffer->settings.owner, owner);
}

/*
 * The transaction that has created the buffer has committed.  Takes no lock,
 * cannot fail.
 */
void
registry_set_committed(SharedBuffer *buffer)
{
	if (pg_atomic_read_u32(&buffer->settings.provisional) != 0)
		pg_atomic_write_u32(&buffer->settings.provisional, 0);
}

/*
 * Set only whether the ledger has the buffer's counts, too, so that the next
 * shutdown does not save them a second time, or saves them.  The caller has a lock
 * on the relation, and is just committing.  Takes no lock, cannot fail.
 */
void
registry_set_durable(SharedBuffer *buffer, bool durable)
{
	if (pg_atomic_read_u32(&buffer->settings.durable) != (uint32) durable)
		pg_atomic_write_u32(&buffer->settings.durable, durable);
}

/* ------------------------------------------------------------------------
 * Waking
 * ------------------------------------------------------------------------
 */

/*
 * Wake the worker, or the launcher if there is none.  Takes no lock, cannot
 * fail.
 */
void
registry_wake(SharedBuffer *buffer)
{
	/*
	 * A worker that leaves wakes the launcher after it has left, so a latch
	 * that is no longer the right one does no harm.
	 */
	Latch	   *latch = *(Latch *volatile *) &buffer->slot.latch;

	if (latch != NULL)
		SetLatch(latch);
	else
		launcher_slot_wake();
}

/*
 * Make the requests in the mask, and wake the worker, or the launcher if there
 * is none.  Takes no lock, cannot fail.
 */
void
registry_ask(SharedBuffer *buffer, uint32 what)
{
	requests_ask(&buffer->requests, what);
	registry_wake(buffer);
}

/*
 * Wake the workers of a database, or with InvalidOid, all workers.  Locks
 * partitions of the registry.
 */
void
registry_wake_workers(Oid dboid)
{
	RegistryScan scan;
	SharedBuffer *buffer;

	registry_begin_scan(&scan);
	while ((buffer = registry_next(&scan)) != NULL)
	{
		Latch	   *latch = *(Latch *volatile *) &buffer->slot.latch;

		if (latch != NULL &&
			(buffer->key.dboid == dboid || !OidIsValid(dboid)))
			SetLatch(latch);
	}
	registry_end_scan(&scan);
}

/* Does the buffer need a worker?  For the launcher; takes no lock. */
bool
registry_wants_worker(SharedBuffer *buffer)
{
	if ((pg_atomic_read_u32(&buffer->requests.asked) |
		 buffer->requests.taken) & REQUEST_RECHECK)
		return true;
	if (registry_is_dropped(buffer))
		return true;
	return !registry_is_stopped(buffer) &&
		(requests_are_open(&buffer->requests) ||
		 !schedule_is_empty(&buffer->schedule));
}

/* ------------------------------------------------------------------------
 * Claims
 * ------------------------------------------------------------------------
 */

/* Remove a buffer from the list of this process's claims. */
static void
forget_claim(SharedBuffer *buffer)
{
	for (int i = 0; i < lengthof(claims); i++)
		if (claims[i] == buffer)
			claims[i] = NULL;
}

/*
 * Become the worker of a buffer.  Returns NULL if it does not exist, if it has
 * a worker, or if another process is saving the counts.
 *
 * The caller must call registry_release() or remove the buffer;
 * registry_release_all() does so when the process ends.  Locks the partition
 * of the registry and takes SharedControl.lock.
 */
SharedBuffer *
registry_claim(Oid dboid, Oid relid)
{
	SharedBufferKey key = {dboid, relid};
	SharedBuffer *buffer;
	int			i = 0;
	bool		claimed = false;

	while (claims[i] != NULL)
		i++;
	Assert(i < lengthof(claims));

	/* the lock keeps the buffer from being removed until we have claimed it */
	buffer = registry_lock(&key);
	if (buffer == NULL)
		return NULL;

	LWLockAcquire(&shared_control->lock, LW_EXCLUSIVE);
	if (buffer->slot.pid == 0 &&
		(!registry_is_closed() || launcher_slot_is_mine()))
	{
		buffer->slot.pid = MyProcPid;
		buffer->slot.latch = MyLatch;

		/*
		 * If a worker is starting while the launcher has claimed the buffer
		 * to load counts, or another worker has, it must not be taken for one
		 * that has failed to connect.
		 */
		buffer->slot.connected = launcher_slot_is_mine() ||
			OidIsValid(MyDatabaseId);
		shared_control->claims.nclaimed++;
		claims[i] = buffer;
		claimed = true;
	}
	LWLockRelease(&shared_control->lock);
	registry_unlock(buffer);
	return claimed ? buffer : NULL;
}

/*
 * Cease to be the worker of a buffer, and wake the launcher, which checks
 * whether the buffer needs another one.  A `code' other than 0 indicates a
 * failure; then no other worker follows at once.  Takes SharedControl.lock.
 */
void
registry_release(SharedBuffer *buffer, int code)
{
	SharedSlot *slot = &buffer->slot;

	forget_claim(buffer);
	LWLockAcquire(&shared_control->lock, LW_EXCLUSIVE);
	Assert(registry_is_mine(buffer));
	slot->pid = 0;
	slot->latch = NULL;
	slot->left_at = clock_now();
	if (code != 0)
		slot->start_after = Max(slot->start_after,
								clock_add(slot->left_at, WORKER_FAILED_MSECS));
	shared_control->claims.nclaimed--;
	LWLockRelease(&shared_control->lock);

	if (!launcher_slot_is_mine())
		launcher_slot_wake();
}

/*
 * Cease to be the worker of every buffer that this process has claimed.  Takes
 * SharedControl.lock.
 */
void
registry_release_all(int code)
{
	for (int i = 0; i < lengthof(claims); i++)
		if (claims[i] != NULL)
			registry_release(claims[i], code);
}

/*
 * Close the registry: from here on no other process may count or flush,
 * because the counts are about to be saved.  Returns false, and changes
 * nothing, if any buffer has a worker.  The caller is the launcher, or acts as
 * the launcher.  Takes SharedControl.lock.
 */
bool
registry_close(void)
{
	bool		closed = false;

	LWLockAcquire(&shared_control->lock, LW_EXCLUSIVE);
	Assert(launcher_slot_is_mine());
	if (shared_control->claims.nclaimed == 0)
	{
		pg_atomic_write_u32(&shared_control->claims.closed, 1);
		closed = true;
	}
	LWLockRelease(&shared_control->lock);

	/* the caller reads pins only after this */
	pg_memory_barrier();
	return closed;
}

/* Log what is lost with a buffer whose relation is gone. */
static void
log_dropped(SharedBuffer *buffer, bool with_database)
{
	SharedTotals *totals = &buffer->totals;
	uint64		nkeys = table_nkeys(&buffer->table);
	uint64		sum = pg_atomic_read_u64(&totals->stats[STAT_PUBLISHED]) -
	pg_atomic_read_u64(&totals->stats[STAT_FLUSHED_COUNT]) -
	pg_atomic_read_u64(&totals->stats[STAT_DISCARDED]);

	/* whoever rolls its creation back, again and again, must not fill the log */
	if (sum != 0)
		ereport(pg_atomic_read_u32(&buffer->settings.provisional) != 0 ? DEBUG1 : LOG,
				(with_database ?
				 errmsg("statbuffer dropped the counts of a database that no longer exists") :
				 errmsg("statbuffer dropped the counts of a buffer that no longer exists"),
				 errdetail_plural("Relation %u of database %u held a count of %lld in %llu key.",
								  "Relation %u of database %u held counts of %lld altogether in %llu keys.",
								  nkeys, buffer->key.relid, buffer->key.dboid,
								  (long long) sum, (unsigned long long) nkeys)));
}

/*
 * Begin to remove a buffer whose relation is gone, and which nobody uses or can
 * use any more.  The caller has claimed it.  Logs what is lost, unless the
 * relation was never committed.  Does nothing if another process has begun.
 *
 *	  in use
 *		| registry_begin_drop(): nothing is scheduled any more, and the buffer
 *		v							wants a worker
 *	  dropped
 *		| registry_continue_drop(), by each process that has claimed the
 *		v							buffer, once or several times
 *	  removed
 *
 * A process may release it in between, for another one to go on; so does one
 * that meets an error.  What a dropped buffer holds is not saved.
 *
 * Raises an error if memory cannot be mapped; then nothing has begun.  Takes
 * SharedControl.lock.
 */
void
registry_begin_drop(SharedBuffer *buffer, bool with_database)
{
	Assert(registry_is_mine(buffer));
	if (registry_is_dropped(buffer))
		return;
	requests_drop_flushes(&buffer->requests);
	registry_start_after(buffer, 0);
	log_dropped(buffer, with_database);

	/* from here on nothing fails; a worker is needed at once */
	schedule_clear(&buffer->schedule);
	schedule_set_awake(&buffer->schedule);
	pg_atomic_write_u32(&buffer->settings.dropped, 1);
	ConditionVariableBroadcast(&shared_control->drain_cv);
}

/*
 * Continue to remove a buffer: frees some of its keys, and in the end the
 * buffer.  Returns whether it is gone.  The caller has claimed the buffer, and
 * wakes the launcher afterwards unless it ends soon, for the reason given at
 * space_trim(); or it releases the buffer.
 *
 * Raises an error if memory cannot be mapped; whoever calls this next goes on.
 * Locks partitions of the table and of the registry, and takes
 * SharedControl.lock.
 */
bool
registry_continue_drop(SharedBuffer *buffer)
{
	SharedBufferKey key = buffer->key;

	Assert(registry_is_mine(buffer) && registry_is_dropped(buffer));
	if (table_clear(&buffer->table))
		return false;
	table_destroy(&buffer->table);

	forget_claim(buffer);
	dshash_delete_key(registry, &key);
	LWLockAcquire(&shared_control->lock, LW_EXCLUSIVE);
	shared_control->claims.nclaimed--;
	LWLockRelease(&shared_control->lock);
	space_trim();
	return true;
}

/* ------------------------------------------------------------------------
 * The worker's slot
 * ------------------------------------------------------------------------
 */

/*
 * Note whether the worker that was started last has connected.  Takes
 * SharedControl.lock, as the other functions of this section do.
 */
void
registry_set_connected(SharedBuffer *buffer, bool connected)
{
	LWLockAcquire(&shared_control->lock, LW_EXCLUSIVE);
	buffer->slot.connected = connected;
	LWLockRelease(&shared_control->lock);
}

/* Start no worker before `when'; 0 means at once. */
void
registry_start_after(SharedBuffer *buffer, ClockTime when)
{
	/*
	 * Read without the lock: a process that sets it also wakes one that
	 * checks again.
	 */
	if (when == 0 && *(volatile ClockTime *) &buffer->slot.start_after == 0)
		return;
	LWLockAcquire(&shared_control->lock, LW_EXCLUSIVE);
	buffer->slot.start_after = when;
	LWLockRelease(&shared_control->lock);
}

/*
 * Wake the worker, and if the buffer has failed lately, allow an attempt at
 * once: a request is a reason to retry.  It must have been made before: a worker
 * that is about to leave for a pause looks for it.
 */
void
registry_call_worker(SharedBuffer *buffer)
{
	registry_start_after(buffer, 0);
	registry_wake(buffer);
}

/*
 * Count a worker that has not connected; returns how many in a row have not.
 */
int
registry_start_failed(SharedBuffer *buffer)
{
	int			failures;

	LWLockAcquire(&shared_control->lock, LW_EXCLUSIVE);
	failures = ++buffer->slot.start_failures;
	LWLockRelease(&shared_control->lock);
	return failures;
}

/* A worker has connected as the buffer's owner. */
void
registry_start_succeeded(SharedBuffer *buffer)
{
	LWLockAcquire(&shared_control->lock, LW_EXCLUSIVE);
	buffer->slot.start_failures = 0;
	LWLockRelease(&shared_control->lock);
}

#ifdef USE_ASSERT_CHECKING
/*
 * May this process work in the buffer's table: has it a lock on the relation, or
 * does it act as the worker?
 */
bool
registry_is_usable(SharedBuffer *buffer)
{
	LOCKTAG		tag;

	if (registry_is_mine(buffer))
		return true;
	SET_LOCKTAG_RELATION(tag, buffer->key.dboid, buffer->key.relid);
	return compat_lock_held_or_stronger(&tag, AccessShareLock);
}
#endif

/* ------------------------------------------------------------------------
 * Errors and statistics
 * ------------------------------------------------------------------------
 */

/* Copy a text, which may be NULL, and cut it to `size' bytes with its end. */
static void
copy_text(char *copy, const char *text, int size)
{
	int			len = 0;

	if (text !=NULL)
	{
		len = pg_mbcliplen(text, strlen(text), size - 1);
		memcpy(copy, text, len);
	}
	copy[len] = '\0';
}

/*
 * Store a buffer's last failure, and wake the sessions that wait for a drain:
 * they tell of it.  Takes SharedTotals.lock.
 */
void
registry_set_failure(SharedBuffer *buffer, const BufferFailure *failure)
{
	SharedTotals *totals = &buffer->totals;
	SharedFailure *shared = &totals->failure;

	LWLockAcquire(&totals->lock, LW_EXCLUSIVE);
	shared->number++;
	shared->at = GetCurrentTimestamp();
	shared->retry_at = failure->retry_at;
	copy_text(shared->message, failure->message, SHARED_ERROR_SIZE);
	copy_text(shared->detail, failure->detail, SHARED_ADVICE_SIZE);
	copy_text(shared->hint, failure->hint, SHARED_ADVICE_SIZE);
	totals->broken = failure->broken;
	LWLockRelease(&totals->lock);

	ConditionVariableBroadcast(&shared_control->drain_cv);
}

/* Get the number of failures so far.  Takes SharedTotals.lock. */
uint64
registry_count_failures(SharedBuffer *buffer)
{
	uint64		number;

	LWLockAcquire(&buffer->totals.lock, LW_SHARED);
	number = buffer->totals.failure.number;
	LWLockRelease(&buffer->totals.lock);
	return number;
}

/* Get the last failure.  Takes SharedTotals.lock. */
void
registry_get_failure(SharedBuffer *buffer, SharedFailure *failure)
{
	LWLockAcquire(&buffer->totals.lock, LW_SHARED);
	*failure = buffer->totals.failure;
	LWLockRelease(&buffer->totals.lock);
}

/*
 * The buffer works again; its last error can still be read.  Takes
 * SharedTotals.lock.
 */
void
registry_clear_error(SharedBuffer *buffer)
{
	SharedTotals *totals = &buffer->totals;

	/*
	 * Usually there is nothing to do, so look without the lock first. Besides
	 * the worker and sb_start(), only the launcher writes this, for a buffer
	 * without a worker.
	 */
	if (!totals->broken)
		return;
	LWLockAcquire(&totals->lock, LW_EXCLUSIVE);
	totals->broken = false;
	LWLockRelease(&totals->lock);
}

/*
 * May a session log that the buffer discards counts, as every transaction would
 * while memory is out?  Takes no lock.
 */
bool
registry_may_warn(SharedBuffer *buffer)
{
	return clock_limit_shared(&buffer->totals.warned_at, WARN_MSECS);
}

/* Reset the statistics.  Takes SharedTotals.lock. */
void
registry_reset_stats(SharedBuffer *buffer)
{
	SharedTotals *totals = &buffer->totals;

	LWLockAcquire(&totals->lock, LW_EXCLUSIVE);
	for (int i = 0; i < STAT_COUNT; i++)
		totals->base[i] = pg_atomic_read_u64(&totals->stats[i]);
	totals->reset_at = GetCurrentTimestamp();
	totals->failure.at = 0;
	pg_atomic_write_u64(&totals->last_flush, 0);
	LWLockRelease(&totals->lock);
}
