/*-------------------------------------------------------------------------
 *
 * load.h
 *	  Loading the counts that were saved at the last shutdown.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_LOAD_H
#define STATBUFFER_LOAD_H

/* The result of load_continue(). */
typedef enum LoadProgress
{
	LOAD_FINISHED,				/* everything is in memory */
	LOAD_BLOCKED,				/* a buffer has a worker */
	LOAD_FAILED					/* there was an error */
} LoadProgress;

/* for all processes */
extern bool load_is_pending(void);

/* for the launcher, or the process that acts as the launcher */
extern LoadProgress load_continue(void);
extern bool load_find_rest(const char **name, int64 *section, int64 *offset);
extern bool load_is_saved(void);
extern void load_set_saved(void);

#endif							/* STATBUFFER_LOAD_H */
