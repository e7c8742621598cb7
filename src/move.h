/*-------------------------------------------------------------------------
 *
 * move.h
 *	  Moving a buffer's counters to the present space.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_MOVE_H
#define STATBUFFER_MOVE_H

#include "registry.h"

/*
 * A pass over the counters of a buffer, in portions, by the process that has
 * claimed it.  All zero: none has begun.
 *
 *	  lists			counters that are linked, list by list
 *		|
 *		v
 *	  others		all others, by a scan of the table
 *		|
 *		v
 *	  buckets		those of the table
 *		|
 *		v
 *	  over			if nothing was left behind, SharedTable.moved says so;
 *					otherwise another pass begins after a pause
 *
 * What has moved is known by its pointer, so a pass that breaks off, by an error
 * or because the process ends or passes on, costs nothing but its way: the next
 * one, of any process, begins anew and finds less to do.
 */
typedef enum MoveStep
{
	MOVE_LISTS,
	MOVE_OTHERS,
	MOVE_BUCKETS,
	MOVE_OVER
} MoveStep;

typedef struct MoveState
{
	SharedBufferKey key;		/* of the buffer */
	uint64		table;			/* SharedTable.number */
	uint32		move;			/* space_moving() */
	MoveStep	step;
	int			list;			/* for schedule_move() */
	TableScan	scan;
	SharedBuffer *buffer;		/* in a portion */
	CounterTable attached;
	int64		budget;			/* counters that the portion may still move */
	int64		npassed;		/* how many it has come by, or on lists, how
								 * many that have moved already */
	bool		full;			/* there was no memory */
	bool		some_left;		/* something could not be moved */
	int			pause;			/* before the next pass, in milliseconds */
	ClockTime	again;			/* when that may begin */
} MoveState;

extern ClockTime move_next(const MoveState *state, SharedBuffer *buffer);
extern void move_portion(MoveState *state, SharedBuffer *buffer);

#endif							/* STATBUFFER_MOVE_H */
