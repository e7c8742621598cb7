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
 * Times in the schedule are whole ticks, rounded up, so that no key is due
 * early, and none more than a tick late.
 */
#define SCHEDULE_TICK_USECS		INT64CONST(8000)
#define SCHEDULE_LEVELS			4
#define SCHEDULE_SLOT_BITS		6
#define SCHEDULE_SLOTS			(1 << SCHEDULE_SLOT_BITS)

/* "never": later than any due time */
#define SCHEDULE_NEVER			PG_INT64_MAX

/* A slot of the wheel: a list linked through SharedCounter.next. */
typedef struct WheelSlot
{
	dsa_pointer head;
	int64		earliest;		/* no key in the slot is due before this */
} WheelSlot;

/*
 * The schedule of one buffer: a hierarchical timing wheel that only the
 * buffer's worker accesses, and an inbox through which all other processes add
 * counters.
 *
 * A counter with its LINKED bit set is on exactly one of the lists below.  A
 * process that sets the bit puts the counter on a list: the worker on any,
 * others on the inbox.  Only the worker clears it.
 *
 * Fields marked (w) belong to the worker that has claimed the buffer.  They
 * are in shared memory because workers come and go: the next one continues
 * where the last one stopped.  Each step keeps every counter on some list
 * before it does anything that can fail.
 */
typedef struct SharedSchedule
{
	/* newly scheduled counters; pushed by anyone, taken whole by the worker */
	pg_atomic_uint64 inbox;

	/*
	 * The time by which a process must check this buffer: if there is a
	 * worker, when it wakes up (0 while it is awake), otherwise when a worker
	 * must be running.  A process that schedules something earlier lowers it,
	 * and wakes the worker, or the launcher if there is none.
	 */
	pg_atomic_uint64 wake_at;

	/* when the first key is due, for display; may lag behind */
	pg_atomic_uint64 first_due;

	int64		interval;		/* (w) interval by which the wheel is sorted,
								 * in microseconds */
	dsa_pointer drained;		/* (w) taken from the inbox, not yet sorted in */
	int64		tick;			/* (w) the last tick processed; never
								 * decreases, so that a key that is due stays
								 * due */
	dsa_pointer due_head;		/* (w) list of due keys, first come first */
	dsa_pointer due_tail;		/* (w) */
	uint64		nscheduled;		/* (w) counters in the wheel */

	/*
	 * The number of keys that have become idle since the last reaping, when
	 * the first of them did, and when a worker is needed to reap them if
	 * there is none.
	 */
	uint64		nidle;			/* (w) */
	ClockTime	oldest_idle;	/* (w) */
	ClockTime	reap_at;		/* (w) */

	WheelSlot	slots[SCHEDULE_LEVELS * SCHEDULE_SLOTS];	/* (w) */
} SharedSchedule;

/* the number of lists that schedule_move() goes through */
#define SCHEDULE_LISTS	(SCHEDULE_LEVELS * SCHEDULE_SLOTS + 2)

/*
 * Moves a counter.  Returns its copy, or itself, or to stop, a counter with a
 * NULL pointer.
 */
typedef CounterRef (*ScheduleMover) (CounterRef ref, void *arg);

extern void schedule_init(SharedSchedule *schedule, int64 interval,
						  ClockTime now);

/* for all processes */
extern void schedule_push(SharedSchedule *schedule, CounterRef ref);
extern bool schedule_lower(SharedSchedule *schedule, ClockTime when);
extern bool schedule_is_empty(SharedSchedule *schedule);

/* for the buffer's worker */
extern void schedule_advance(SharedSchedule *schedule, ClockTime now);
extern void schedule_prepare_to_add(SharedSchedule *schedule);
extern void schedule_add(SharedSchedule *schedule, CounterRef ref);
extern void schedule_add_first(SharedSchedule *schedule, CounterRef ref);
extern dsa_pointer schedule_pop_due(SharedSchedule *schedule);
extern void schedule_make_due(SharedSchedule *schedule, CounterRef ref);
extern void schedule_make_all_due(SharedSchedule *schedule, bool failing_too);
extern void schedule_retry(SharedSchedule *schedule);
extern void schedule_sort_again(SharedSchedule *schedule, ClockTime now);
extern uint64 schedule_mark_due(SharedSchedule *schedule, uint32 flag);
extern void schedule_set_interval(SharedSchedule *schedule, int64 interval,
								  ClockTime now);
extern bool schedule_move(SharedSchedule *schedule, int *list,
						  ScheduleMover move, void *arg);
extern void schedule_clear(SharedSchedule *schedule);
extern bool schedule_is_due(SharedSchedule *schedule, SharedCounter *counter);
extern ClockTime schedule_due_now(SharedSchedule *schedule,
								  SharedCounter *counter);
extern ClockTime schedule_next(SharedSchedule *schedule);
extern bool schedule_sleep_until(SharedSchedule *schedule,
								 ClockTime next, ClockTime when);
extern void schedule_set_awake(SharedSchedule *schedule);
extern void schedule_leave(SharedSchedule *schedule);

/* (w) Note that a key has been idle since `since'. */
static inline void
schedule_note_idle(SharedSchedule *schedule, ClockTime since)
{
	schedule->nidle++;
	schedule->oldest_idle = Min(schedule->oldest_idle, since);
}

/* (w) Forget about idle keys, before all keys are checked. */
static inline void
schedule_forget_idle(SharedSchedule *schedule)
{
	schedule->nidle = 0;
	schedule->oldest_idle = SCHEDULE_NEVER;
}

/* (w) Is any key due, as of the last schedule_advance()? */
static inline bool
schedule_has_due(const SharedSchedule *schedule)
{
	return DsaPointerIsValid(schedule->due_head);
}

#endif							/* STATBUFFER_SCHEDULE_H */
