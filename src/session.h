/*-------------------------------------------------------------------------
 *
 * session.h
 *	  A worker's session.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_SESSION_H
#define STATBUFFER_SESSION_H

#include "registry.h"

/* Why a transaction has ended with an error. */
typedef struct SessionEnd
{
	bool		timed_out;		/* the handler's time was up */
	bool		cancelled;		/* a cancel was requested */
	bool		halted;			/* by sb_stop() */
} SessionEnd;

extern void session_begin(SharedBuffer *shared);
extern void session_set_connected(void);
extern void session_end(void);
extern bool session_is_valid(void);

extern void session_begin_transaction(bool cancellable);
extern void session_commit_transaction(void);
extern void session_end_transaction(void);
extern SessionEnd session_stop_watching(void);

extern void session_begin_handler(int timeout);
extern void session_end_handler(void);

extern void session_become_owner(void);
extern bool session_reset(void);

extern void session_set_shutdown(int msecs);
extern int	session_shutdown_msecs(void);
extern ClockTime session_stop_at(ClockTime now);
extern ClockTime session_stops_at(void);

#endif							/* STATBUFFER_SESSION_H */
