/*-------------------------------------------------------------------------
 *
 * schedule.h
 *	  When each key is due: a timing wheel and an inbox.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_SCHEDULE_H
#define STATBUFFER_SCHEDULE_H

#include "clock.h"
#include "counter.h"
#include "port/atomics.h"
#include "utils/dsa.h"

/*
 * Times in the schedule are whole ticks, rounded up, so that nothing comes
 * out before it is due and nothing more than a tick late.
 */
#define SCHEDULE_TICK_USECS		INT64CONST(8000)
#define SCHEDULE_LEVELS			4
#define SCHEDULE_SLOT_BITS		6
#define SCHEDULE_SLOTS			(1 << SCHEDULE_SLOT_BITS)

/* "Nothing to do": later than every time that can be due */
#define SCHEDULE_NEVER			PG_INT64_MAX

/* A slot of the wheel: a list linked through SharedCounter.next. */
typedef struct WheelSlot
{
	dsa_pointer head;
	int64		earliest;		/* no key in the slot is due before this */
} WheelSlot;

/*
 * The schedule of one buffer: a hierarchical timing wheel that only the
 * buffer's worker turns, and an inbox through which all other processes reach
 * it.
 *
 * A counter with its LINKED bit set is on exactly one of the lists below.
 * Whoever sets that bit puts the counter on a list: the worker on any, all
 * others on the inbox.  Only the worker clears it.
 *
 * Fields marked (w) belong to the worker that has claimed the buffer.  They are
 * in shared memory because workers come and go: the next one goes on where the
 * last one stopped.  Each step keeps every counter on some list before it does
 * anything that can fail.
 */
typedef struct SharedSchedule
{
	/* newly scheduled counters; pushed by anyone, taken whole by the worker */
	pg_atomic_uint64 inbox;

	/*
	 * The time by which a process must look at this buffer: what its worker
	 * sleeps until (0 while the worker is awake), or when a worker must be
	 * there if there is none.  A process that schedules something earlier
	 * lowers it, and wakes the worker, or the launcher if there is no worker.
	 */
	pg_atomic_uint64 wake_at;

	/* the first key that is due, for people to look at; may lag behind */
	pg_atomic_uint64 first_due;

	int64		interval;		/* (w) by which the wheel is sorted, in usecs */
	dsa_pointer drained;		/* (w) taken from the inbox, not yet sorted in */
	int64		tick;			/* (w) the last tick that was worked off */
	dsa_pointer due_head;		/* (w) keys that are due, first come first */
	dsa_pointer due_tail;		/* (w) */
	uint64		nscheduled;		/* (w) counters in the wheel */

	/*
	 * Keys that have become idle since the last reaping, since when the first
	 * of them is, and when a worker is wanted to reap them if there is none.
	 */
	uint64		nidle;			/* (w) */
	ClockTime	oldest_idle;	/* (w) */
	ClockTime	reap_at;		/* (w) */

	WheelSlot	slots[SCHEDULE_LEVELS * SCHEDULE_SLOTS];	/* (w) */
} SharedSchedule;

extern void schedule_init(SharedSchedule *schedule, int64 interval,
						  ClockTime now);

/* for all processes */
extern void schedule_push(SharedSchedule *schedule, CounterRef ref);
extern bool schedule_lower(SharedSchedule *schedule, ClockTime when);
extern bool schedule_is_empty(SharedSchedule *schedule);

/* for the buffer's worker */
extern void schedule_advance(SharedSchedule *schedule, ClockTime now);
extern void schedule_add(SharedSchedule *schedule, CounterRef ref);
extern void schedule_add_first(SharedSchedule *schedule, CounterRef ref);
extern dsa_pointer schedule_pop_due(SharedSchedule *schedule);
extern void schedule_make_due(SharedSchedule *schedule, CounterRef ref);
extern void schedule_make_all_due(SharedSchedule *schedule, bool failing_too,
								  ClockTime now);
extern void schedule_retry(SharedSchedule *schedule, ClockTime now);
extern void schedule_sort_again(SharedSchedule *schedule, ClockTime now);
extern uint64 schedule_mark_due(SharedSchedule *schedule, uint32 flag);
extern void schedule_set_interval(SharedSchedule *schedule, int64 interval,
								  ClockTime now);
extern bool schedule_is_due(SharedSchedule *schedule, SharedCounter *counter);
extern ClockTime schedule_due_now(SharedSchedule *schedule,
								  SharedCounter *counter);
extern ClockTime schedule_next(SharedSchedule *schedule);
extern bool schedule_sleep_until(SharedSchedule *schedule,
								 ClockTime next, ClockTime when);
extern void schedule_set_awake(SharedSchedule *schedule);
extern void schedule_leave(SharedSchedule *schedule);

/* (w) A key has had nothing counted since `since'. */
static inline void
schedule_note_idle(SharedSchedule *schedule, ClockTime since)
{
	schedule->nidle++;
	schedule->oldest_idle = Min(schedule->oldest_idle, since);
}

/* (w) Forget which keys are idle, before looking at all of them. */
static inline void
schedule_forget_idle(SharedSchedule *schedule)
{
	schedule->nidle = 0;
	schedule->oldest_idle = SCHEDULE_NEVER;
}

/* (w) Is a key due, as far as the wheel has turned? */
static inline bool
schedule_has_due(const SharedSchedule *schedule)
{
	return DsaPointerIsValid(schedule->due_head);
}

#endif							/* STATBUFFER_SCHEDULE_H */
