/*-------------------------------------------------------------------------
 *
 * clock.c
 *	  An alarm that uses the monotonic clock.
 *
 * PostgreSQL's own timeouts use the system clock: if that is set back after a
 * timeout was enabled, the timeout is late.  Our alarm uses a signal of its
 * own, SIGUSR2, which PostgreSQL does not use in background workers.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <signal.h>

#include "clock.h"

static timer_t alarm_timer;
static volatile ClockTime alarm_at = 0;

/*
 * Create the alarm and set its handler.  Must be called once, in a background
 * worker.  Raises an error if the system has no timer left.
 */
void
clock_make_alarm(pqsigfunc handler)
{
	struct sigevent event = {0};

	event.sigev_notify = SIGEV_SIGNAL;
	event.sigev_signo = SIGUSR2;
	if (timer_create(CLOCK_MONOTONIC, &event, &alarm_timer) != 0)
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_RESOURCES),
				 errmsg("could not create a timer: %m")));
	pqsignal(SIGUSR2, handler);
}

/*
 * Set the alarm to go off at `when', or earlier.  There is only one alarm: its
 * handler determines what is due, and calls this again.  Safe in signal
 * handlers, cannot fail.
 *
 * An alarm that is no longer needed is not cancelled.  So a process that sets
 * one again and again, and always finishes in time, makes few system calls.
 */
void
clock_alarm_by(ClockTime when)
{
	ClockTime	now = clock_now();
	int64		usecs = Max(when - now, 1);
	struct itimerspec timer = {0};

	if (alarm_at > now && alarm_at <= when)
		return;
	alarm_at = when;
	timer.it_value.tv_sec = usecs / USECS_PER_SEC;
	timer.it_value.tv_nsec = usecs % USECS_PER_SEC * 1000;
	(void) timer_settime(alarm_timer, 0, &timer, NULL);
}
