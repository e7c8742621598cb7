/*-------------------------------------------------------------------------
 *
 * shared.h
 *	  The shared memory area, the registry of buffers, and the lock order.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_SHARED_H
#define STATBUFFER_SHARED_H

#include "clock.h"
#include "lib/dshash.h"
#include "port/atomics.h"
#include "schedule.h"
#include "shape.h"
#include "storage/condition_variable.h"
#include "storage/latch.h"
#include "storage/lwlock.h"
#include "utils/dsa.h"
#include "utils/timestamp.h"

/*
 * What the structs in shared memory look like and what their fields mean.  To
 * be counted up with every change of either: in a server that runs while its
 * files are replaced, sessions with one library and with the next one meet.
 */
#define SHARED_LAYOUT		"statbuffer shared memory, layout 2"
#define SHARED_LAYOUT_SIZE	96

/* of the place in the main segment; never to be changed */
#define SHARED_CONTROL_SIZE	2048

/* how long a launcher that was registered has to come up */
#define LAUNCHER_START_MSECS	10000

#define SHARED_ERROR_SIZE	512
#define SHARED_EVICTIONS	8

/* shapes of a buffer's keys at a time; a set of them is a uint32 */
#define SHARED_SHAPES		32

/* A request of sb_flush: a counter, pinned until the worker has seen it. */
typedef struct SharedFlushRequest
{
	dsa_pointer next;
	dsa_pointer counter;
} SharedFlushRequest;

/*
 * Totals since the buffer was registered.  They only grow; a reset remembers
 * where they stood.  The sums of counts wrap silently (they are used only as
 * differences), so they are unsigned.
 */
typedef enum SharedStat
{
	STAT_INCREMENTS,			/* increments published */
	STAT_PUBLISHED,				/* sum of the counts published */
	STAT_FLUSHED_KEYS,
	STAT_FLUSHED_COUNT,			/* sum of the counts stored */
	STAT_HANDLER_CALLS,
	STAT_FAILURES,
	STAT_DISCARDED,				/* sum of the counts given up */
	STAT_COUNT
} SharedStat;

typedef struct SharedBufferKey
{
	Oid			dboid;
	Oid			relid;
} SharedBufferKey;

/*
 * A buffer, as all processes see it: an entry of the registry.
 *
 * It is made by the first transaction that publishes to the buffer and
 * removed when the relation or its database is gone, by the buffer's worker
 * or the launcher.  The address stays good as long as the entry does.
 *
 * Whoever reads or writes the table of counters holds a lock on the relation,
 * to the end of the transaction, or has claimed the buffer as its worker does.
 * So the worker may replace an empty table under AccessExclusiveLock, and
 * nobody works in a table that is being destroyed with its relation.
 */
typedef struct SharedBuffer
{
	SharedBufferKey key;		/* must be first */

	/*
	 * The table of counters, and a number that changes when the table is
	 * replaced.  Written under AccessExclusiveLock on the relation, read
	 * under AccessShareLock.
	 */
	dshash_table_handle table;
	uint32		table_number;

	/* the relation's owner, as whom its worker connects */
	pg_atomic_uint32 owner;

	/* keys held and the bytes that they take; changed with the table */
	pg_atomic_uint64 nkeys;
	pg_atomic_uint64 nbytes;

	/* requests to the worker; whoever makes one calls schedule_poke() after */
	pg_atomic_uint64 flush_requests;	/* list of SharedFlushRequest */
	dsa_pointer flush_taken;	/* (w) those that the worker has taken */
	pg_atomic_uint32 flush_all;
	pg_atomic_uint32 truncated;
	pg_atomic_uint32 recheck;	/* the definition may have changed */
	pg_atomic_uint32 parked;	/* stopped: no worker is wanted (w) */
	pg_atomic_uint32 relieve;	/* memory is short: flush early, and reap */

	/*
	 * sb_stop() waits for the worker: it ends what it does when this time has
	 * come; 0: does not.  Written under ShareRowExclusiveLock on the
	 * relation.
	 */
	pg_atomic_uint64 halt_at;
	pg_atomic_uint64 drain_asked;	/* number of the last sb_drain() */
	pg_atomic_uint64 drain_done;	/* the last one that is satisfied */
	pg_atomic_uint64 drain_due; /* (w) the last one that made keys due */
	pg_atomic_uint64 drain_round;	/* (w) the one that is worked on */
	pg_atomic_uint64 drain_keys;	/* (w) keys still to flush for it */
	pg_atomic_uint32 locked_out;	/* the worker waits for the relation (w) */

	/*
	 * The worker.  Written under SharedControl.lock; read without it only to
	 * choose a latch to set, where a wrong guess costs a needless wake-up.
	 */
	pid_t		worker_pid;		/* 0: none */
	Latch	   *worker_latch;	/* of its PGPROC, which is never freed */
	bool		worker_connected;	/* the last one came up */
	int			start_failures; /* how many in a row didn't */
	ClockTime	start_after;	/* no worker is started before this */
	int			breakdowns;		/* (w) failures of the buffer itself, in a row */
	int			failure_logged; /* (w) the SQLSTATE that the log was told last */
	ClockTime	failure_logged_at;	/* (w) when; 0: never */
	uint64		failures_untold;	/* (w) since then */
	ClockTime	left_at;		/* when the last worker left */

	/*
	 * Keys that have become idle since the last reaping, since when the first
	 * of them is, and when a worker is wanted to reap them if there is none.
	 */
	uint64		nidle;			/* (w) */
	ClockTime	oldest_idle;	/* (w) */
	ClockTime	reap_at;		/* (w) */

	uint8		seen_shape;		/* (w) the one that the worker saw last, */
	uint32		seen_shapes;	/* (w) and shapes_number then */

	/* taken and not settled: written by the worker, read by anyone */
	pg_atomic_uint64 in_flight;
	pg_atomic_uint32 failing;	/* keys whose last attempt failed */
	pg_atomic_uint64 last_flush;	/* as TimestampTz; 0: never */

	/* statistics; see SharedStat */
	pg_atomic_uint64 stats[STAT_COUNT];

	/* protects what follows, and the errors that counters point to */
	LWLock		lock;
	uint64		stats_base[STAT_COUNT]; /* stats at the last reset */
	TimestampTz stats_reset;
	TimestampTz last_error_at;	/* 0: none */
	char		last_error[SHARED_ERROR_SIZE];
	bool		broken;			/* the buffer itself fails, not a key */

	/*
	 * The shapes that its keys have, or had lately, each a KeyShape; or
	 * InvalidDsaPointer.  One is only removed under AccessExclusiveLock on
	 * the relation.  The number changes with them; it is read without the
	 * lock to see whether they have to be looked at again.
	 */
	dsa_pointer shapes[SHARED_SHAPES];
	uint32		shapes_number;

	SharedSchedule schedule;
} SharedBuffer;

/*
 * The root of everything.
 *
 * Lock order: heavyweight locks; a registry partition; SharedControl.lock; a
 * partition of a table of counters; SharedBuffer.lock; the locks of dsa.c.
 * Under an LWLock of ours nothing waits on a latch, runs SQL or reads
 * catalogs.
 */
typedef struct SharedControl
{
	/* SHARED_LAYOUT and some sizes; constant.  Must be first. */
	char		layout[SHARED_LAYOUT_SIZE];

	LWLock		lock;			/* protects all that isn't said otherwise */

	/*
	 * How many buffers have somebody who acts as their worker.  Once `closed'
	 * is set, which happens when nobody does and the server is about to stop,
	 * what is counted has been or is being saved: only the process that saves
	 * acts as a worker, and nobody adds to a count.  Read without the lock by
	 * those who add, after they have pinned the counter; so who closes and
	 * then finds a counter without pins knows that its count is final.
	 */
	int			nclaimed;
	pg_atomic_uint32 closed;

	/* what became of the file that the last shutdown left; see saved.c */
	pg_atomic_uint32 saved_state;
	int64		saved_section;	/* only the launcher's */
	int64		saved_offset;	/* only the launcher's */
	ConditionVariable saved_cv; /* broadcast when it is loaded */

	/* constant once made */
	int			tranche_control;
	int			tranche_area;
	int			tranche_registry;
	int			tranche_counters;
	int			tranche_buffer;

	/* written once, together, when the first process needs the area */
	bool		ready;
	dsa_handle	area;
	dshash_table_handle registry;

	/* the launcher; the latch is read without the lock as the worker's is */
	pid_t		launcher_pid;	/* 0: none */
	Latch	   *launcher_latch;
	bool		launcher_leaving;	/* waits for the next one to replace it */
	ClockTime	launcher_asked; /* when one was last registered */

	/*
	 * The bytes that the keys of all buffers take.  Who finds that they come
	 * near the bound, or meets it, sets `crowded' and wakes the launcher,
	 * which has buffers relieved until they don't.
	 */
	pg_atomic_uint64 nbytes;
	pg_atomic_uint32 crowded;

	/* buffers with due keys and no free slot; written by the launcher */
	pg_atomic_uint32 waiting;

	/*
	 * Where sb_drain() waits.  Broadcast when a buffer's drain_done, parked
	 * or locked_out changes, and when a buffer is removed: who waits has no
	 * lock that would keep it.
	 */
	ConditionVariable drain_cv;

	/* databases that workers must keep out of for a while */
	struct
	{
		Oid			dboid;
		ClockTime	until;
	}			evictions[SHARED_EVICTIONS];
} SharedControl;

extern SharedControl *shared_control;
extern dsa_area *shared_area;
extern dshash_table *shared_registry;

extern void shared_request(void);
extern bool shared_open(int elevel);

/* (w) A key has nothing counted, and had nothing since then. */
static inline void
shared_note_idle(SharedBuffer *buffer, ClockTime since)
{
	buffer->nidle++;
	buffer->oldest_idle = Min(buffer->oldest_idle, since);
}

extern bool shared_attach(bool create);
extern void shared_set_limit(void);
extern void shared_unmap_freed(void);

extern SharedBuffer *shared_find_buffer(Oid dboid, Oid relid);
extern SharedBuffer *shared_make_buffer(Oid dboid, Oid relid, Oid owner,
										int64 interval);
struct CounterTable;
extern void shared_find_shape(SharedBuffer *buffer, const KeyShape *shape,
							  bool create, struct CounterTable *table);
extern int	shared_count_shapes(SharedBuffer *buffer);
extern void shared_remove_shapes(SharedBuffer *buffer, uint32 used);
extern void shared_remove_buffer(SharedBuffer *buffer);

extern SharedBuffer *shared_claim_worker(Oid dboid, Oid relid);
extern void shared_release_worker(SharedBuffer *buffer, int code);
extern void shared_release_claims(int code);
extern bool shared_close(void);

extern bool shared_claim_launcher(void);
extern bool shared_offer_launcher(bool leaving);
extern void shared_release_launcher(void);
extern void shared_wake_launcher(void);
extern bool shared_needs_launcher(void);

extern void shared_evict_database(Oid dboid, ClockTime until);
extern ClockTime shared_evicted_until(Oid dboid);

extern void shared_set_error(SharedBuffer *buffer, const char *message,
							 bool broken);
extern void shared_mend(SharedBuffer *buffer);

#endif							/* STATBUFFER_SHARED_H */
