/*-------------------------------------------------------------------------
 *
 * space.c
 *	  The memory of counters: an area that is replaced when little of it is
 *	  left in use.
 *
 * Why, and by which protocol, is told at SharedSpaces in shmem.h.  What is in an
 * area must be moved by those who know all pointers to it: see move.c.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "compat.h"
#include "settings.h"
#include "space.h"
#include "utils/memutils.h"

/*
 * The space is sparse if more than the half of what it has held is free, of what
 * exceeds so much.  So what is moved is less than what was freed before.
 */
#define SPARSE_MIN_SIZE		(4 * 1024 * 1024)

/* a pointer to the area's own data, which every process has mapped */
#define SOME_POINTER		((dsa_pointer) 8)

LocalSpace	space_local[SHARED_SPACES];

static inline SharedSpace *
shared_place(int place)
{
	return &shared_control->spaces.places[place];
}

/*
 * The most memory that there may be for counters.  The rest of
 * statbuffer.max_memory is the first segment of the area of all else.
 */
size_t
space_bound(void)
{
	return (size_t) statbuffer_max_memory * 1024 - SHMEM_FIRST_SEGMENT;
}

/* ------------------------------------------------------------------------
 * Attaching
 * ------------------------------------------------------------------------
 */

/* Note that the process is attached to the present area of a place. */
static void
note_attached(int place, dsa_area *area)
{
	dsa_pin_mapping(area);
	space_local[place].area = area;
	space_local[place].generation =
		pg_atomic_read_u32(&shared_place(place)->generation);
}

/* Detach from the area of a place, if attached. */
static void
detach(int place)
{
	dsa_area   *area = space_local[place].area;

	space_local[place].area = NULL;
	space_local[place].generation = 0;
	if (area != NULL)
		dsa_detach(area);
}

/*
 * Attach to the area of a place, instead of one that it had before.  Something
 * keeps it from being removed: an object in it, or SharedControl.lock.  Raises
 * an error if memory is out.
 */
void
space_attach(int place)
{
	MemoryContext oldcontext;

	detach(place);

	/* what led here was written after the area */
	pg_read_barrier();
	oldcontext = MemoryContextSwitchTo(TopMemoryContext);
	note_attached(place, dsa_attach(shared_place(place)->area));
	MemoryContextSwitchTo(oldcontext);
}

/*
 * Detach from areas that are removed, so that their memory returns to the
 * system.  Who counts or reads calls this again and again.
 */
void
space_detach_removed(void)
{
	if (shared_area == NULL)
		return;
	for (int i = 0; i < SHARED_SPACES; i++)
		if (unlikely(space_has_changed(i)))
			detach(i);
}

/*
 * Give a place that has none an area, and attach to it.  The caller holds
 * SharedControl.lock.  On error nothing has changed.
 */
static void
make_area(int place)
{
	SharedSpace *shared = shared_place(place);
	size_t		largest = shmem_largest_segment();
	size_t		bound = space_bound();
	MemoryContext oldcontext;
	dsa_area   *area;

	Assert(LWLockHeldByMe(&shared_control->lock));
	Assert(shared->area == DSM_HANDLE_INVALID);
	detach(place);
	oldcontext = MemoryContextSwitchTo(TopMemoryContext);
	area = compat_create_area(shared_control->tranches.area, largest);
	MemoryContextSwitchTo(oldcontext);

	/* from here on nothing fails */
	shared->limit = COMPAT_SEGMENTS_BOUNDED ? bound : Min(bound, largest);
	dsa_set_size_limit(area, shared->limit);
	dsa_pin(area);
	shared->area = dsa_get_handle(area);
	pg_write_barrier();
	pg_atomic_fetch_add_u32(&shared->generation, 1);
	note_attached(place, area);
}

/*
 * Attach to the area of the present place, in which the caller has counted an
 * object.  The first process that comes here makes it, and others wait for it
 * to have done so.  Takes SharedControl.lock.
 */
static void
attach_present(int place)
{
	LWLockAcquire(&shared_control->lock, LW_EXCLUSIVE);
	if (shared_place(place)->area == DSM_HANDLE_INVALID)
		make_area(place);
	else
		space_attach(place);
	LWLockRelease(&shared_control->lock);
}

/* ------------------------------------------------------------------------
 * Allocating
 * ------------------------------------------------------------------------
 */

static inline void
leave(int place, uint32 nobjects)
{
	pg_atomic_fetch_sub_u64(&shared_control->memory.nobjects[place], nobjects);
}

/*
 * Count objects in the present place, which stays what it is until they are
 * freed, or until space_end_reserve().  The caller calls that in any case, when
 * it has allocated what it needs, and on error.  Takes no lock, cannot fail.
 */
void
space_reserve(SpaceReserve * reserve, uint32 nobjects)
{
	pg_atomic_uint32 *current = &shared_control->spaces.current;

	reserve->nobjects = nobjects;
	for (;;)
	{
		int			place = (int) pg_atomic_read_u32(current);

		/* this is a barrier */
		pg_atomic_fetch_add_u64(&shared_control->memory.nobjects[place],
								nobjects);
		reserve->place = place;
		if (likely(place == (int) pg_atomic_read_u32(current)))
			return;
		leave(place, nobjects);
	}
}

/* Of the objects of a reserve, count only those that were allocated. */
void
space_end_reserve(SpaceReserve * reserve)
{
	if (reserve->nobjects > 0)
		leave(reserve->place, reserve->nobjects);
	reserve->nobjects = 0;
}

/*
 * An allocation has failed at a limit of the area's size.  If that is less than
 * statbuffer.max_memory, raise it, unless another process has, and return true.
 *
 * Before version 17, dsa.c makes each segment twice as large as the one before
 * the last, but not beyond the limit.  So the limit is raised in steps, and a
 * segment is no larger than a step.
 */
static bool
raise_limit(int place, size_t limit)
{
	SharedSpace *shared = shared_place(place);
	size_t		bound = space_bound();

	if (limit >= bound)
		return false;
	LWLockAcquire(&shared_control->lock, LW_EXCLUSIVE);
	if (shared->limit == limit)
	{
		shared->limit = Min(bound, limit + shmem_largest_segment());
		dsa_set_size_limit(space_local[place].area, shared->limit);
	}
	LWLockRelease(&shared_control->lock);
	return true;
}

/* Allocate one of the objects of a reserve, as space_allocate() does. */
static inline dsa_pointer
allocate(SpaceReserve * reserve, Size size, int flags)
{
	int			place = reserve->place;
	dsa_pointer pointer;
	size_t		limit;

	Assert(reserve->nobjects > 0);
	if (unlikely(space_has_changed(place)))
		attach_present(place);
	do
	{
		limit = *(volatile size_t *) &shared_place(place)->limit;
		pointer = dsa_allocate_extended(space_local[place].area, size,
										flags | DSA_ALLOC_NO_OOM);
	} while (unlikely(!DsaPointerIsValid(pointer)) && raise_limit(place, limit));
	if (unlikely(!DsaPointerIsValid(pointer)))
		return InvalidDsaPointer;
	reserve->nobjects--;
	return pointer | (dsa_pointer) place << SPACE_SHIFT;
}

/* The same, for callers that have PG_TRY. */
dsa_pointer
space_allocate_reserved(SpaceReserve * reserve, Size size)
{
	return allocate(reserve, size, 0);
}

/*
 * Allocate memory for counters.  Returns InvalidDsaPointer if the limit of
 * their memory is reached.  Raises an error if the system has no memory.  The
 * caller holds no lock of ours.
 */
dsa_pointer
space_allocate(Size size, int flags)
{
	SpaceReserve reserve;
	volatile dsa_pointer pointer = InvalidDsaPointer;

	space_reserve(&reserve, 1);
	PG_TRY();
	{
		pointer = allocate(&reserve, size, flags);
	}
	PG_FINALLY();
	{
		space_end_reserve(&reserve);
	}
	PG_END_TRY();
	return pointer;
}

/*
 * The same for what can be done without: returns InvalidDsaPointer also if
 * memory was out a moment ago.
 */
dsa_pointer
space_try_allocate(Size size, int flags)
{
	dsa_pointer pointer;

	if (shmem_has_refused())
		return InvalidDsaPointer;
	pointer = space_allocate(size, flags);
	shmem_note_refusal(!DsaPointerIsValid(pointer));
	return pointer;
}

/*
 * Free what was allocated here.  May raise an error if memory cannot be mapped;
 * then it is not freed, but does not keep its area from being removed.  So the
 * caller forgets the pointer before: an object that was freed twice would be
 * counted twice.
 */
void
space_free(dsa_pointer pointer)
{
	int			place = space_place(pointer);
	dsa_area   *area;

	if (unlikely(space_has_changed(place)))
	{
		PG_TRY();
		{
			space_attach(place);
		}
		PG_CATCH();
		{
			leave(place, 1);
			PG_RE_THROW();
		}
		PG_END_TRY();
	}
	area = space_local[place].area;
	leave(place, 1);
	dsa_free(area, pointer & SPACE_MASK);
}

/* ------------------------------------------------------------------------
 * The areas as a whole
 * ------------------------------------------------------------------------
 */

/*
 * Return empty blocks to the system, after a lot was freed.  Wakes the
 * launcher, which must unmap them, too, and may otherwise sleep for a long
 * time, and which begins a move if little is left.
 */
void
space_trim(void)
{
	dsa_trim(shared_area);
	space_detach_removed();
	for (int i = 0; i < SHARED_SPACES; i++)
		if (space_local[i].area != NULL)
			dsa_trim(space_local[i].area);
	launcher_slot_wake();
}

/*
 * Unmap segments that other processes have freed: the memory of a segment is
 * returned to the system when the last process unmaps it.  dsa.c checks for
 * such segments whenever it is asked for an address, even for one that is
 * always mapped.
 */
void
space_unmap_freed(void)
{
	(void) dsa_get_address(shared_area, SOME_POINTER);
	space_detach_removed();
	for (int i = 0; i < SHARED_SPACES; i++)
		if (space_local[i].area != NULL)
			(void) dsa_get_address(space_local[i].area, SOME_POINTER);
}

/*
 * Apply statbuffer.max_memory.  For the launcher.  Takes SharedControl.lock.
 */
void
space_set_limit(void)
{
	size_t		bound = space_bound();

	shmem_set_limit();
	LWLockAcquire(&shared_control->lock, LW_EXCLUSIVE);
	for (int i = 0; i < SHARED_SPACES; i++)
	{
		SharedSpace *shared = shared_place(i);

		if (shared->area == DSM_HANDLE_INVALID)
			continue;
		if (space_has_changed(i))
			space_attach(i);
		shared->limit = COMPAT_SEGMENTS_BOUNDED ? bound :
			Min(bound, shared->limit);
		dsa_set_size_limit(space_local[i].area, shared->limit);
	}
	LWLockRelease(&shared_control->lock);
}

/*
 * The bytes that were taken from the system for everything, if
 * COMPAT_AREA_SIZE_KNOWN.  Takes SharedControl.lock.
 */
size_t
space_mapped(void)
{
	size_t		mapped = compat_area_size(shared_area);

	LWLockAcquire(&shared_control->lock, LW_EXCLUSIVE);
	for (int i = 0; i < SHARED_SPACES; i++)
	{
		if (shared_place(i)->area == DSM_HANDLE_INVALID)
			continue;
		if (space_has_changed(i))
			space_attach(i);
		mapped += compat_area_size(space_local[i].area);
	}
	LWLockRelease(&shared_control->lock);
	return mapped;
}

/* ------------------------------------------------------------------------
 * Moving
 * ------------------------------------------------------------------------
 */

/*
 * Keys are about to be freed: note how much is in use.  Processes that do so at
 * the same moment may lose what one has written; it was little more.
 */
void
space_note_use(void)
{
	SharedMemoryUse *memory = &shared_control->memory;
	uint64		nbytes = pg_atomic_read_u64(&memory->nbytes);

	if (nbytes > pg_atomic_read_u64(&memory->most))
		pg_atomic_write_u64(&memory->most, nbytes);
}

/* Is so little of the present space in use that what is left should be moved? */
bool
space_is_sparse(void)
{
	SharedMemoryUse *memory = &shared_control->memory;
	uint64		nbytes = pg_atomic_read_u64(&memory->nbytes);

	return pg_atomic_read_u64(&memory->most) >
		nbytes + nbytes / 2 + SPARSE_MIN_SIZE;
}

/*
 * Make a new space, into which everything is to be moved.  For the launcher.
 * Raises an error if the system has no memory; then nothing has changed.  Takes
 * SharedControl.lock.
 */
void
space_begin_move(void)
{
	SharedSpaces *spaces = &shared_control->spaces;
	int			other = !pg_atomic_read_u32(&spaces->current);

	Assert(launcher_slot_is_mine() && space_moving() == 0);
	LWLockAcquire(&shared_control->lock, LW_EXCLUSIVE);
	make_area(other);
	pg_atomic_write_u64(&shared_control->memory.most,
						pg_atomic_read_u64(&shared_control->memory.nbytes));
	pg_atomic_write_u32(&spaces->current, (uint32) other);

	/* who looks for what is to be moved knows where it is to go */
	pg_memory_barrier();
	pg_atomic_write_u32(&spaces->moving, ++spaces->last_move);
	LWLockRelease(&shared_control->lock);
}

/*
 * Have everything looked through again, because something is left in the old
 * space.  For the launcher.
 */
void
space_move_again(void)
{
	SharedSpaces *spaces = &shared_control->spaces;

	Assert(launcher_slot_is_mine() && space_moving() != 0);
	pg_atomic_write_u32(&spaces->moving, ++spaces->last_move);
}

/*
 * If nothing is left in the old space, remove it.  Returns whether that was so.
 * For the launcher.  May raise an error if memory is out; then nothing has
 * changed.  Takes SharedControl.lock.
 */
bool
space_end_move(void)
{
	SharedSpaces *spaces = &shared_control->spaces;
	int			old = !pg_atomic_read_u32(&spaces->current);
	SharedSpace *shared = shared_place(old);

	Assert(launcher_slot_is_mine() && space_moving() != 0);
	pg_memory_barrier();
	if (!space_is_moved())
		return false;

	LWLockAcquire(&shared_control->lock, LW_EXCLUSIVE);
	if (shared->area != DSM_HANDLE_INVALID)
	{
		if (space_has_changed(old))
			space_attach(old);
		dsa_unpin(space_local[old].area);
		shared->area = DSM_HANDLE_INVALID;
		pg_atomic_fetch_add_u32(&shared->generation, 1);
	}
	pg_atomic_write_u32(&spaces->moving, 0);
	LWLockRelease(&shared_control->lock);
	space_detach_removed();
	return true;
}
