/*-------------------------------------------------------------------------
 *
 * space.h
 *	  The memory of counters: an area that is replaced when little of it is
 *	  left in use.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_SPACE_H
#define STATBUFFER_SPACE_H

#include "compat.h"
#include "shmem.h"

/*
 * What is allocated here has pointers whose highest bit is the number of the
 * place (SharedSpaces).  dsa.c uses 50 bits.
 */
#define SPACE_SHIFT		63
#define SPACE_MASK		((UINT64CONST(1) << SPACE_SHIFT) - 1)

/* The area of a place, as this process is attached to it. */
typedef struct LocalSpace
{
	dsa_area   *area;			/* NULL: not attached */
	uint32		generation;		/* that of the place then; 0: never */
} LocalSpace;

extern LocalSpace space_local[SHARED_SPACES];

/*
 * Objects that are counted in advance, in the place where they will be
 * allocated, so that the next ones cost no more than dsa.c takes.
 */
typedef struct SpaceReserve
{
	int			place;
	uint32		nobjects;		/* those that are still to be allocated */
}			SpaceReserve;

extern void space_attach(int place);
extern void space_detach_removed(void);
extern void space_reserve(SpaceReserve * reserve, uint32 nobjects);
extern dsa_pointer space_allocate_reserved(SpaceReserve * reserve, Size size);
extern void space_end_reserve(SpaceReserve * reserve);
extern dsa_pointer space_allocate(Size size, int flags);
extern dsa_pointer space_try_allocate(Size size, int flags);
extern void space_free(dsa_pointer pointer);
extern void space_trim(void);
extern void space_unmap_freed(void);
extern size_t space_bound(void);
extern void space_set_limit(void);
extern size_t space_mapped(void);

/* moving: see SharedSpaces */
extern void space_note_use(void);
extern bool space_is_sparse(void);
extern void space_begin_move(void);
extern void space_move_again(void);
extern bool space_end_move(void);

/* The number of the place that a pointer leads to. */
static inline int
space_place(dsa_pointer pointer)
{
	return (int) (pointer >> SPACE_SHIFT);
}

/* Has the place another area, or none, since this process has attached? */
static inline bool
space_has_changed(int place)
{
	return space_local[place].generation !=
		pg_atomic_read_u32(&shared_control->spaces.places[place].generation);
}

/*
 * Get the address of what was allocated here; NULL for InvalidDsaPointer.
 * Raises an error if it cannot be mapped.
 */
static inline void *
space_address(dsa_pointer pointer)
{
	int			place = space_place(pointer);

	if (!DsaPointerIsValid(pointer))
		return NULL;
	if (unlikely(space_has_changed(place)))
		space_attach(place);
	return dsa_get_address(space_local[place].area, pointer & SPACE_MASK);
}

/* Is it to be moved?  Only while there is a move in progress. */
static inline bool
space_is_old(dsa_pointer pointer)
{
	return space_place(pointer) !=
		(int) pg_atomic_read_u32(&shared_control->spaces.current);
}

/* Is nothing left in the old space?  Only while there is a move in progress. */
static inline bool
space_is_moved(void)
{
	int			old = !pg_atomic_read_u32(&shared_control->spaces.current);

	return pg_atomic_read_u64(&shared_control->memory.nobjects[old]) == 0;
}

/* The number of the move in progress, or 0. */
static inline uint32
space_moving(void)
{
	return pg_atomic_read_u32(&shared_control->spaces.moving);
}

#endif							/* STATBUFFER_SPACE_H */
