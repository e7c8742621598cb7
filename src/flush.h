/*-------------------------------------------------------------------------
 *
 * flush.h
 *	  One flush.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_FLUSH_H
#define STATBUFFER_FLUSH_H

#include "buffer.h"
#include "storage/lock.h"

/*
 * The lock under which a worker flushes, from before it locks the relation:
 * sb_stop() takes it to have the worker end what it does, and not begin
 * anything before the option is set.  In the space of advisory locks, where
 * SQL can't reach field 4's value; see also set_large_tag().
 */
static inline void
flush_set_gate_tag(LOCKTAG *tag, Oid dboid, Oid relid)
{
	SET_LOCKTAG_ADVISORY(*tag, dboid, relid, 0, 4);
}

/* What a worker process works on, and how it stands with it. */
typedef struct WorkerState
{
	Oid			relid;
	SharedBuffer *shared;		/* NULL: it is not ours any more */
	SbBuffer   *buffer;			/* NULL: the definition wasn't read yet */
	bool		leaving;		/* the main loop ends */
	ClockTime	paused_until;	/* the buffer fails, or is in others' way */

	/* for the signal handler that ends what takes too long */
	volatile int shutdown_msecs;	/* the buffer's option */
	volatile ClockTime stop_at; /* 0: nobody has told us to stop */
} WorkerState;

extern WorkerState worker;

extern void flush_claimed(SharedBuffer *shared);
extern void flush_connected(void);
extern void flush_end(void);
extern void flush_begin_transaction(void);
extern void flush_commit_transaction(void);
extern void flush_check_definition(void);
extern int	flush_shutdown_msecs(void);
extern void flush_batch(ClockTime now);
extern void flush_log_discarded(bool at_once);

#endif							/* STATBUFFER_FLUSH_H */
