/*-------------------------------------------------------------------------
 *
 * hashtable.h
 *	  A concurrent hash table of counters, which grows and shrinks in steps.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_HASHTABLE_H
#define STATBUFFER_HASHTABLE_H

#include "counter.h"
#include "storage/lwlock.h"

/* the upper bits of a hash choose the partition */
#define HASH_PARTITION_BITS	7
#define HASH_PARTITIONS		(1 << HASH_PARTITION_BITS)

/* how many buckets a scan looks ahead; a power of 2 */
#define HASH_SCAN_AHEAD		32

/* buckets in the partition itself; a power of 2 */
#define HASH_FIRST_BUCKETS	4

/*
 * A partition: a hash table of its own, by linear hashing.
 *
 * It has as many buckets as keys, or a few more while it shrinks: each new key
 * splits one bucket, in the order of their numbers, and so nothing ever moves
 * but the keys of one bucket.  The chain of a bucket goes through the counters
 * themselves.
 *
 * The first buckets are here.  The others are in chunks; `root' is the only
 * chunk, or if there are more, a HashDirectory of them.
 *
 * Everything is protected by `lock'.  While it is held, no memory is allocated
 * (what may be needed is allocated before: see HashSpare), and memory is only
 * changed when all that is to be changed is mapped, so that no error can leave
 * the table half changed.
 */
typedef struct HashPartition
{
	LWLock		lock;
	uint32		nkeys;
	uint32		nbuckets;		/* at least HASH_FIRST_BUCKETS */
	dsa_pointer root;
	dsa_pointer buckets[HASH_FIRST_BUCKETS];
} HashPartition;

/*
 * Memory that a partition may need to grow.  hash_plan() says how much, under
 * the lock, and hash_prepare() allocates it without.  If the partition has
 * changed in between, what was allocated may not fit; then the partition grows
 * with a later key.
 */
typedef struct HashSpare
{
	uint32		chunk_size;		/* number of buckets; 0: none is needed */
	uint64		directory_size; /* number of chunks; 0: none is needed */
	dsa_pointer chunk;
	dsa_pointer directory;
} HashSpare;

/* A bucket that a scan comes to. */
typedef struct HashScanBucket
{
	dsa_pointer *head;
	uint64		begin;			/* its interval of reversed hashes */
	uint64		end;
} HashScanBucket;

/*
 * A scan, in portions, with the lock of a partition held during each.  Between
 * portions nothing is locked, and the table may grow and shrink.  A counter
 * that is in the table all the time is returned exactly once.
 *
 * The scan goes by the reversed bits of hashes, because a bucket holds an
 * interval of them: splitting a bucket halves its interval.
 */
typedef struct HashScan
{
	HashPartition *partitions;
	LWLockMode	mode;
	int			partition;		/* the present one, or HASH_PARTITIONS at the
								 * end */
	uint64		position;		/* reversed hashes below this are done */
	bool		locked;			/* in a portion */
	int			steps;			/* counters and buckets seen in it */

	/* in a portion: a ring of the buckets that come next */
	uint64		nentered;		/* the number of buckets entered, */
	uint64		nahead;			/* and of those put into the ring */
	uint64		ahead_position; /* where the next to be put there begins */
	HashScanBucket ahead[HASH_SCAN_AHEAD];

	/* in a bucket */
	uint64		bucket_end;		/* the end of its interval */
	bool		some_done;		/* its interval begins before `position' */
	dsa_pointer *link;			/* what leads to the current counter; NULL:
								 * not in a bucket */
	SharedCounter *counter;		/* the current one; NULL: deleted, or none */
} HashScan;

/* how many keys the functions that take many can take at a time */
#define HASH_MANY			256

/* A key and its counter, for functions that take many keys of a partition. */
typedef struct HashItem
{
	KeyBytes	key;
	CounterRef	ref;			/* of a NULL pointer: not there, or not yet */
} HashItem;

/* The number of the partition of a hash. */
static inline int
hash_partition_number(uint32 hash)
{
	return hash >> (32 - HASH_PARTITION_BITS);
}

extern void hash_init(HashPartition *partitions, int tranche);
extern void hash_free_buckets(HashPartition *partitions);

extern LWLock *hash_lock(HashPartition *partitions, uint32 hash,
						 LWLockMode mode);
extern CounterRef hash_find(HashPartition *partitions, const KeyBytes *key,
							uint8 shape);
extern void hash_plan(const HashPartition *partitions, uint32 hash,
					  HashSpare *spare);
extern void hash_prepare(HashSpare *spare);
extern void hash_insert(HashPartition *partitions, uint32 hash,
						CounterRef ref, HashSpare *spare);
extern void hash_free_spare(HashSpare *spare);
extern void hash_reserve(HashPartition *partitions, uint32 hash, uint32 nkeys,
						 HashSpare *spare);
extern void hash_find_many(HashPartition *partitions, HashItem *items, int n,
						   uint8 shape);
extern int	hash_insert_many(HashPartition *partitions, const HashItem *items,
							 int n, uint8 shape);

extern void hash_begin_scan(HashScan *scan, HashPartition *partitions,
							LWLockMode mode);
extern bool hash_begin_portion(HashScan *scan);
extern CounterRef hash_next(HashScan *scan);
extern void hash_delete_current(HashScan *scan);
extern void hash_end_portion(HashScan *scan);
extern uint64 hash_position(uint32 hash);
extern uint64 hash_scan_position(const HashScan *scan);

extern bool hash_move(HashPartition *partitions, CounterRef ref,
					  CounterRef copy, Size size, bool linked,
					  pg_atomic_uint64 *nmoved);
extern bool hash_move_buckets(HashPartition *partitions, int number,
							  dsa_pointer *held);

extern int	hash_take(HashPartition *partitions, dsa_pointer *taken, int max,
					  dsa_pointer *list);

#endif							/* STATBUFFER_HASHTABLE_H */
