/*-------------------------------------------------------------------------
 *
 * registry.h
 *	  Buffers as all processes see them.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_REGISTRY_H
#define STATBUFFER_REGISTRY_H

#include "clock.h"
#include "lib/dshash.h"
#include "miscadmin.h"
#include "pace.h"
#include "requests.h"
#include "schedule.h"
#include "shmem.h"
#include "storage/latch.h"
#include "storage/lock.h"
#include "storage/lwlock.h"
#include "table.h"
#include "utils/timestamp.h"

#define SHARED_ERROR_SIZE	512

/* space for the detail of an error, and for its hint */
#define SHARED_ADVICE_SIZE	256

typedef struct SharedBufferKey
{
	Oid			dboid;
	Oid			relid;
} SharedBufferKey;

/*
 * The part of a buffer's definition that is needed by processes that do not
 * look at the catalogs.
 *
 * Written by registry_set(), by a process that knows the committed definition
 * and keeps it from being changed: sb_start(); one that has locked the
 * relation to count (RowExclusiveLock blocks ALTER and sb_stop(), and
 * sb_start() changes only buffers in which nobody can count); or the worker
 * with the gate.  The owner is also written by registry_set_owner(), for which
 * any lock on the relation will do, `provisional' by registry_set_committed(),
 * `durable' by registry_set_durable(), and `dropped' by registry_begin_drop().
 * Read without a lock; the launcher
 * may see an older state.
 */
typedef struct SharedSettings
{
	pg_atomic_uint32 owner;		/* role as which the worker connects */
	pg_atomic_uint32 stopped;	/* no worker may run */
	pg_atomic_uint32 provisional;	/* no process has seen it committed */
	pg_atomic_uint32 dropped;	/* the relation is gone for good; a process
								 * must remove what is left */
	pg_atomic_uint32 durable;	/* the ledger has its counts, too */
	pg_atomic_uint64 interval;	/* microseconds */
	pg_atomic_uint64 jitter;	/* microseconds */
	pg_atomic_uint64 max_memory;	/* of its keys, in bytes; 0: no bound */
} SharedSettings;

/* The same, in local memory. */
typedef struct BufferSettings
{
	Oid			owner;
	bool		stopped;
	bool		provisional;
	bool		durable;
	int64		interval;		/* microseconds */
	int64		jitter;			/* microseconds */
	uint64		max_memory;		/* bytes */
} BufferSettings;

/*
 * The buffer's worker, or the process that acts as the worker.  Written under
 * SharedControl.lock, by registry.c alone.  Read without the lock where an old
 * value does no harm: for display, to choose a latch to set, and by processes
 * that check again under the lock or when they are woken next.
 */
typedef struct SharedSlot
{
	pid_t		pid;			/* 0: none */
	Latch	   *latch;			/* of its PGPROC, which is never freed */
	bool		connected;		/* the last worker has connected */
	int			start_failures; /* how many workers in a row have not
								 * connected */
	ClockTime	start_after;	/* start no worker before this */
	ClockTime	left_at;		/* when the last worker left */
} SharedSlot;

/*
 * The state of flushes.  For the worker only; the next worker continues from
 * here.  Others may look at what was converted, to see whether to ask for it.
 */
typedef struct SharedFlush
{
	int			breakdowns;		/* failures of the buffer itself, in a row */
	int			conflicts;		/* deadlocks and the like, in a row */
	int			cancels;		/* in a row */
	uint8		seen_shape;		/* number of the shape last seen, */
	uint32		seen_shapes;	/* and SharedTable.shapes_number then */
	uint8		converted_shape;	/* the same, when all keys were last
									 * converted that could be */
	uint32		converted_shapes;
	SharedPace	pace;

	/* the log of failures */
	int			logged_sqlstate;
	ClockTime	logged_at;		/* 0: never */
	uint64		suppressed;		/* failures since then */

	/* the log of discarded counts */
	ClockTime	discarded_logged_at;	/* 0: never */
	uint64		discarded;		/* sum since then */
	bool		any_discarded;
} SharedFlush;

/*
 * What sessions must know of the counts that are in flight, to tell whether they
 * are stored: see total.c.  Atomic, without a lock; written by the worker.
 *
 * `xid' is invalid from before the first count of a batch is taken until shortly
 * before the batch's transaction commits, and then that transaction.  A session
 * that reads it after a count that is in flight gets that of the same batch, or
 * finds that `ended' has changed.
 */
typedef struct SharedInFlight
{
	pg_atomic_uint32 xid;
	pg_atomic_uint32 ended;		/* batches whose counts have begun to leave
								 * their flight */
} SharedInFlight;

/*
 * Totals since the buffer was registered.  They are never set back; a reset
 * stores their values as a base.  The sums of counts wrap silently (they are
 * used only as differences), so they are unsigned.
 */
typedef enum SharedStat
{
	STAT_INCREMENTS,			/* increments published */
	STAT_PUBLISHED,				/* sum of the counts published, with those
								 * that were discarded because memory was out */
	STAT_FLUSHED_KEYS,
	STAT_FLUSHED_COUNT,			/* sum of the counts stored */
	STAT_HANDLER_CALLS,
	STAT_FAILURES,
	STAT_DISCARDED,				/* sum of the counts discarded */
	STAT_COUNT
} SharedStat;

/*
 * The last failure of a buffer, or of a key; see SharedTotals.  The texts are cut
 * to their size.
 */
typedef struct SharedFailure
{
	uint64		number;			/* of failures so far; 0: none, and the rest
								 * means nothing */
	TimestampTz at;				/* 0: the statistics were reset since */
	ClockTime	retry_at;		/* when the next attempt is; 0: not known, or
								 * none */
	char		message[SHARED_ERROR_SIZE];
	char		detail[SHARED_ADVICE_SIZE]; /* empty: none, as the hint */
	char		hint[SHARED_ADVICE_SIZE];
} SharedFailure;

/* A failure, for registry_set_failure().  Detail and hint may be NULL. */
typedef struct BufferFailure
{
	const char *message;
	const char *detail;
	const char *hint;
	ClockTime	retry_at;		/* as in SharedFailure */
	bool		broken;			/* the buffer itself fails (its shape, owner
								 * or handler), and not only a key */
} BufferFailure;

typedef struct SharedTotals
{
	/* atomic, without a lock */
	pg_atomic_uint64 in_flight; /* taken and not stored; by the worker */
	pg_atomic_uint64 last_flush;	/* as TimestampTz; 0: never */
	pg_atomic_uint64 stats[STAT_COUNT];
	pg_atomic_uint64 warned_at; /* see registry_may_warn(); 0: never */

	LWLock		lock;			/* protects what follows */
	uint64		base[STAT_COUNT];	/* stats at the last reset */
	TimestampTz reset_at;
	SharedFailure failure;
	bool		broken;			/* the buffer itself fails, not a key */
} SharedTotals;

/*
 * A buffer: an entry of the registry.  Each part states its lock rules.
 *
 * It is made by the first process that publishes to the buffer or starts it,
 * or by the launcher when it loads saved counts.  When the relation or its
 * database is gone, it is removed by a process that has claimed it: the
 * buffer's worker, another worker of the database, or the launcher.  That is
 * done in steps, and another process may go on; see registry_begin_drop().  Its
 * address stays valid as long as the entry exists, which a lock on the
 * relation, a claim, or registry_lock() ensures.
 *
 * `ledger_loaded' says that memory has all that the ledger has of a durable
 * buffer, also while SharedDatabase.loaded does not say so of all buffers.  Set
 * by a process with a lock on the relation, when it commits.
 */
typedef struct SharedBuffer
{
	SharedBufferKey key;		/* constant; must be first */
	SharedSettings settings;
	SharedSlot	slot;
	SharedTable table;
	SharedRequests requests;
	SharedFlush flush;
	SharedInFlight in_flight;
	SharedTotals totals;
	SharedSchedule schedule;
	pg_atomic_uint32 ledger_loaded;
} SharedBuffer;

/* A scan of the registry, which holds the lock of a partition. */
typedef struct RegistryScan
{
	dshash_seq_status status;
} RegistryScan;

/*
 * Our locks in the space of advisory locks.  Field 4 of the tag distinguishes
 * them, with values that SQL cannot use.
 */
typedef enum RegistryLock
{
	REGISTRY_LOCK_LARGE = 3,	/* large changes to a buffer's counts */
	REGISTRY_LOCK_GATE = 4		/* held by a worker that flushes; see
								 * buffer_set_gate_tag() */
} RegistryLock;

/* Set the tag of one of a buffer's locks. */
static inline void
registry_set_locktag(LOCKTAG *tag, const SharedBufferKey *key, RegistryLock lock)
{
	SET_LOCKTAG_ADVISORY(*tag, key->dboid, key->relid, 0, lock);
}

extern bool registry_attach(bool create);
extern SharedBuffer *registry_find(Oid dboid, Oid relid);
extern SharedBuffer *registry_make(Oid dboid, Oid relid,
								   const BufferSettings *settings,
								   bool *made);
extern SharedBuffer *registry_lock(const SharedBufferKey *key);
extern void registry_unlock(SharedBuffer *buffer);
extern void registry_begin_scan(RegistryScan *scan);
extern SharedBuffer *registry_next(RegistryScan *scan);
extern void registry_end_scan(RegistryScan *scan);
extern void registry_set(SharedBuffer *buffer, const BufferSettings *settings);
extern void registry_set_owner(SharedBuffer *buffer, Oid owner);

extern void registry_set_committed(SharedBuffer *buffer);
extern void registry_set_durable(SharedBuffer *buffer, bool durable);

extern void registry_wake(SharedBuffer *buffer);
extern void registry_ask(SharedBuffer *buffer, uint32 what);
extern void registry_wake_workers(Oid dboid);
extern bool registry_wants_worker(SharedBuffer *buffer);

extern SharedBuffer *registry_claim(Oid dboid, Oid relid);
extern void registry_release(SharedBuffer *buffer, int code);
extern void registry_release_all(int code);
extern void registry_begin_drop(SharedBuffer *buffer, bool with_database);
extern bool registry_continue_drop(SharedBuffer *buffer);
extern bool registry_close(void);
extern void registry_set_connected(SharedBuffer *buffer, bool connected);
extern void registry_start_after(SharedBuffer *buffer, ClockTime when);
extern void registry_call_worker(SharedBuffer *buffer);
extern int	registry_start_failed(SharedBuffer *buffer);
extern void registry_start_succeeded(SharedBuffer *buffer);

extern void registry_set_failure(SharedBuffer *buffer,
								 const BufferFailure *failure);
extern uint64 registry_count_failures(SharedBuffer *buffer);
extern void registry_get_failure(SharedBuffer *buffer, SharedFailure *failure);
extern void registry_clear_error(SharedBuffer *buffer);
extern bool registry_may_warn(SharedBuffer *buffer);
extern void registry_reset_stats(SharedBuffer *buffer);

/*
 * Does this process act as the buffer's worker?  What is marked (w) is its, and
 * nobody else writes the slot meanwhile.
 */
static inline bool
registry_is_mine(SharedBuffer *buffer)
{
	return buffer->slot.pid == MyProcPid;
}

#ifdef USE_ASSERT_CHECKING
extern bool registry_is_usable(SharedBuffer *buffer);
#endif

/* The buffer's interval, in microseconds. */
static inline int64
registry_interval(SharedBuffer *buffer)
{
	return (int64) pg_atomic_read_u64(&buffer->settings.interval);
}

/* How much memory the buffer's keys may take, in bytes; 0: no bound. */
static inline uint64
registry_max_memory(SharedBuffer *buffer)
{
	return pg_atomic_read_u64(&buffer->settings.max_memory);
}

/* The bytes that the buffer takes, for display. */
static inline uint64
registry_memory(SharedBuffer *buffer)
{
	return sizeof(SharedBuffer) + table_memory(&buffer->table);
}

/* Is the buffer stopped?  Without a lock; see SharedSettings. */
static inline bool
registry_is_stopped(SharedBuffer *buffer)
{
	return pg_atomic_read_u32(&buffer->settings.stopped) != 0;
}

/*
 * Were all keys converted that could be, since an attachment's shape is the
 * present one and the keys have the shapes that it knows?
 */
static inline bool
registry_is_converted(SharedBuffer *buffer, const CounterTable *table)
{
	return buffer->flush.converted_shape == table->shape &&
		buffer->flush.converted_shapes == table->shapes_number;
}

/* Is the relation gone for good?  Without a lock; see SharedSettings. */
static inline bool
registry_is_dropped(SharedBuffer *buffer)
{
	return pg_atomic_read_u32(&buffer->settings.dropped) != 0;
}

/* Are the counts being saved?  Call this after pinning a counter. */
static inline bool
registry_is_closed(void)
{
	return pg_atomic_read_u32(&shared_control->claims.closed) != 0;
}

/* Has the ledger the buffer's counts, too?  Without a lock; see SharedSettings. */
static inline bool
registry_is_durable(SharedBuffer *buffer)
{
	return pg_atomic_read_u32(&buffer->settings.durable) != 0;
}

/* Add to one of the buffer's totals.  Takes no lock, cannot fail. */
static inline void
registry_count(SharedBuffer *buffer, SharedStat stat, uint64 count)
{
	pg_atomic_fetch_add_u64(&buffer->totals.stats[stat], count);
}

#endif							/* STATBUFFER_REGISTRY_H */
