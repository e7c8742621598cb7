/*-------------------------------------------------------------------------
 *
 * shmem.h
 *	  The shared memory area, and the launcher's slot.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_SHMEM_H
#define STATBUFFER_SHMEM_H

#include "clock.h"
#include "lib/dshash.h"
#include "miscadmin.h"
#include "port/atomics.h"
#include "storage/condition_variable.h"
#include "storage/latch.h"
#include "storage/lwlock.h"
#include "storage/dsm_impl.h"
#include "utils/dsa.h"

/*
 * Identifies the layout of the structs in shared memory, and the meaning of
 * their fields.  Increase the number with every change of either: the server's
 * files can be replaced while it runs, and then sessions with the old and with
 * the new library meet in the same memory.
 */
#define SHARED_LAYOUT		"statbuffer shared memory, layout 10"
#define SHARED_LAYOUT_SIZE	96

/* size of the space reserved in the main segment; must never change */
#define SHARED_CONTROL_SIZE	2048

/* how long a registered launcher may take to come up */
#define LAUNCHER_START_MSECS	10000

#define SHARED_EVICTIONS	8

/* the size of the first segment of an area */
#define SHMEM_FIRST_SEGMENT	((size_t) 1024 * 1024)

/* how many areas of counters there can be at a time */
#define SHARED_SPACES		2

/* the most buffers that are listed as waiting */
#define QUEUE_SIZE			64

/*
 * The launcher, or the process that acts as the launcher.  Written under
 * SharedControl.lock.  `pid' and `latch' are read without it, to check whether
 * there is a launcher and to wake it: a wrong guess costs a needless wake-up.
 */
typedef struct SharedLauncher
{
	pid_t		pid;			/* 0: none */
	Latch	   *latch;
	bool		leaving;		/* waits for its successor */
	ClockTime	asked;			/* when one was last registered; 0: never */
} SharedLauncher;

/*
 * A database that workers must stay out of.  Protected by SharedControl.lock.
 *
 * Sessions that want the same database alone share an entry, and the last one
 * clears it.  `number' identifies an entry's use: if it was given to another
 * database meanwhile, the number has changed.
 */
typedef struct SharedEviction
{
	Oid			dboid;
	int			nsessions;
	uint64		number;
	ClockTime	until;			/* 0: not in use */
} SharedEviction;

/*
 * Claims on buffers, and whether new ones are possible.  See registry.c.
 *
 * `nclaimed' is the number of buffers that have a worker, or a process that
 * acts as the worker; protected by SharedControl.lock.  `closed' is set, under
 * the same lock, when that number is 0 and the server is about to stop.  From
 * then on only the process that saves the counts acts as a worker, and no
 * process adds to a count.
 *
 * Processes that add read `closed' without the lock, after they have pinned
 * the counter.  So once it is set, the count of a counter without pins is
 * final.
 */
typedef struct SharedClaims
{
	int			nclaimed;
	pg_atomic_uint32 closed;
} SharedClaims;

/*
 * How much of the file from the last shutdown is in memory.  See load.c.
 * `state' is written by the launcher and, if there is no file, by any process;
 * the rest by the launcher alone.
 *
 * `offset' is that of the first record which is not loaded, or not completely.
 * `section' is that of the section that it belongs to, or 0, and `nkeys' is how
 * many keys of it are loaded.  All keys of the section that are below the
 * position `reached' are in memory.
 *
 * Other processes read `offset' and then `reached'.  The launcher sets `reached'
 * to 0 before it goes to another section, so that what they see of it is never
 * too much.  `cv' is broadcast when more is loaded.
 */
typedef struct SharedLoad
{
	pg_atomic_uint32 state;
	uint32		nkeys;
	int64		section;
	pg_atomic_uint64 offset;
	pg_atomic_uint64 reached;
	ConditionVariable cv;
} SharedLoad;

/*
 * The memory that the keys of all buffers use, in bytes.  See table.c.  A
 * process that finds it near the limit, or exceeding it, sets
 * `short_of_memory' and wakes the launcher, which then requests early flushes.
 * `refused_at' is the time, as ClockTime, when there was last no memory for
 * shmem_try_allocate(), and `exhausted_at' when a key last got none, though the
 * limit was not reached; 0: never, or that is over.
 *
 * `most' is how much `nbytes' has been since the present space was made; it is
 * brought up to date before keys are freed.  `nobjects' is how many objects there
 * are in each place of SharedSpaces, with those that are just being allocated.
 */
typedef struct SharedMemoryUse
{
	pg_atomic_uint64 nbytes;
	pg_atomic_uint32 short_of_memory;
	pg_atomic_uint64 refused_at;
	pg_atomic_uint64 exhausted_at;
	pg_atomic_uint64 most;
	pg_atomic_uint64 nobjects[SHARED_SPACES];
} SharedMemoryUse;

/* A buffer that waits for a worker, and its owner as the launcher knows it. */
typedef struct QueueEntry
{
	Oid			dboid;
	Oid			relid;
	Oid			owner;
} QueueEntry;

/*
 * The buffers with due keys and no worker, as the launcher has found them in
 * its last walk, without those that workers have taken since.  Protected by
 * SharedControl.lock, except that workers read `waiting' without it.  See
 * queue.c.
 */
typedef struct SharedQueue
{
	pg_atomic_uint32 waiting;	/* how many there are, listed or not; and 1
								 * while saved counts are being loaded */
	bool		loading;		/* they are */
	int			nentries;
	QueueEntry	entries[QUEUE_SIZE];	/* who has waited longest first */
} SharedQueue;

/* A place for an area of counters.  See SharedSpaces. */
typedef struct SharedSpace
{
	pg_atomic_uint32 generation;	/* changes when it gets or loses its area;
									 * never 0 */
	dsa_handle	area;			/* DSM_HANDLE_INVALID: none */
	size_t		limit;			/* of the area's size, as dsa.c knows it */
} SharedSpace;

/*
 * The memory of counters, and of the buckets of their tables.  See space.c.
 *
 * dsa.c returns a segment to the system when nothing in it is used.  After most
 * keys are gone, a few that stay, and dsa.c's own descriptors, keep all of it.
 * So the counters are in an area of their own, the present space.  When much
 * less is used than was, another one is made, what is left is moved there, and
 * the old one is removed as a whole.  A pointer to a counter says, in its
 * highest bit, in which of the two places its area is.
 *
 *	  at rest		the other place is empty, moving = 0
 *		| space_begin_move(): an area is made there, and becomes the present one.
 *		v							Each new counter is allocated in it
 *	  moving		processes that have claimed buffers move their counters:
 *		|			see move.c
 *		| space_end_move(): nothing is left in the old area
 *		v
 *	  at rest		the area is removed when the last process detaches from it
 *
 * The launcher goes from state to state, under SharedControl.lock; another
 * launcher goes on from where one has left.  When it does not come to the end,
 * it gives `moving' another number, and all buffers are looked through again.
 *
 * A place changes only while it is not the present one and `nobjects' of it is
 * 0.  A process that allocates first adds 1 to that of the present place, and
 * then sees whether it still is the present place; space_end_move() looks at
 * `nobjects' after another place has become that.  So one of the two notices the
 * other, and an area is there as long as anybody has a pointer into it.
 * Freeing first subtracts 1: who frees is attached to the area, so that it is
 * there until he has detached.
 *
 * If a process ends with an error, or is terminated, its counts of objects are
 * right: an object is counted from before it is allocated, and whoever allocates
 * it frees it on errors.  If a process is killed, the server reinitializes
 * shared memory.
 *
 * `current' and `generation' are read all the time, and so they are not next to
 * anything that changes as often as keys are made: see SharedMemoryUse.
 */
typedef struct SharedSpaces
{
	pg_atomic_uint32 current;	/* the present place */
	pg_atomic_uint32 moving;	/* number of the move in progress, or 0 */
	uint32		last_move;		/* the last number; for the launcher */
	SharedSpace places[SHARED_SPACES];
} SharedSpaces;

/* The tranches of our LWLocks.  Constant. */
typedef struct SharedTranches
{
	int			control;
	int			area;
	int			registry;
	int			counters;
	int			table;
	int			totals;
} SharedTranches;

/*
 * The root of everything in shared memory.
 *
 * Lock order: heavyweight locks; a partition of the registry;
 * SharedControl.lock; a partition of a table of counters; SharedTable.lock;
 * SharedTotals.lock; the locks of dsa.c.  While a process holds an LWLock of
 * ours, it does not wait on a latch, run SQL or read catalogs.
 */
typedef struct SharedControl
{
	/* SHARED_LAYOUT and some sizes; constant.  Must be first. */
	char		layout[SHARED_LAYOUT_SIZE];

	LWLock		lock;			/* protects all fields that do not say
								 * otherwise */
	SharedTranches tranches;

	/* set once, by the first process that needs them */
	dsa_handle	area;			/* DSM_HANDLE_INVALID: not made yet */
	dshash_table_handle registry;	/* or InvalidDsaPointer */
	dshash_table_handle databases;	/* likewise; see ledger.h */
	SharedSpaces spaces;

	SharedLauncher launcher;
	SharedClaims claims;
	SharedLoad	load;
	SharedMemoryUse memory;
	pg_atomic_uint64 last_table;	/* number of the last table made */
	uint64		last_eviction;	/* the last SharedEviction.number */
	SharedEviction evictions[SHARED_EVICTIONS];
	SharedQueue queue;

	/*
	 * Processes that wait for drains sleep on this: see requests.h.  It is
	 * here because a process that waits for a buffer has no lock that would
	 * keep the buffer from being removed.
	 */
	ConditionVariable drain_cv;
} SharedControl;

extern SharedControl *shared_control;
extern dsa_area *shared_area;

extern void shmem_request(void);
extern bool shmem_open(int elevel);
extern bool shmem_attach(bool create);
extern dshash_table *shmem_attach_table(dshash_table_handle *handle,
										Size key_size, Size entry_size,
										bool create);
extern void shmem_set_limit(void);
extern size_t shmem_largest_segment(void);
extern dsa_pointer shmem_try_allocate(Size size, int flags);
extern bool shmem_has_refused(void);
extern void shmem_note_refusal(bool refused);

extern bool launcher_slot_claim(void);
extern bool launcher_slot_offer(bool leaving);
extern void launcher_slot_release(void);
extern void launcher_slot_wake(void);
extern bool launcher_slot_needs_process(void);

/* Is there a launcher?  Takes no lock, so it may come or go at any time. */
static inline bool
launcher_slot_is_taken(void)
{
	return *(volatile pid_t *) &shared_control->launcher.pid != 0;
}

/* Is this process the launcher, or does it act as the launcher? */
static inline bool
launcher_slot_is_mine(void)
{
	return *(volatile pid_t *) &shared_control->launcher.pid == MyProcPid;
}

#endif							/* STATBUFFER_SHMEM_H */
