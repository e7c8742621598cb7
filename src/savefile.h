/*-------------------------------------------------------------------------
 *
 * savefile.h
 *	  The file of counts that were not stored at a shutdown: its format.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_SAVEFILE_H
#define STATBUFFER_SAVEFILE_H

#include "key.h"
#include "port/pg_crc32c.h"
#include "shape.h"
#include "utils/timestamp.h"

/* in the data directory */
#define SAVED_FILE			"statbuffer.saved"
#define SAVED_LOADING_FILE	"statbuffer.loading"
#define SAVED_TEMP_FILE		"statbuffer.saved.tmp"

/* how many keys to read or write before showing the progress again */
#define SAVED_PROGRESS_KEYS		65536

typedef struct SavedHeader
{
	uint32		magic;
	uint32		version;
	uint64		system_identifier;
	uint64		length;			/* of everything after the header */
	uint64		nkeys;
	TimestampTz saved_at;
	TimeLineID	timeline;
	uint32		nsections;
	pg_crc32c	crc;			/* of everything after the header, and of the
								 * fields above */
} SavedHeader;

/*
 * The header is followed by records.  A section states to which buffer, and to
 * which of its shapes, the keys in the blocks after it belong.  The shape, a
 * KeyShape, follows the section; the keys, in a packed form, follow the block.
 *
 * The keys of a section are in the order of scans of the buffer's table.  A
 * block's keys are of one partition of the table, and all keys of the section
 * below a position are in the blocks before the one that begins there.
 *
 * The records are followed by one SavedRange for each section, which says where
 * that is.
 */
#define RECORD_SECTION		1
#define RECORD_BLOCK		2

typedef struct SavedSection
{
	uint32		kind;
	Oid			dboid;
	Oid			relid;
	Oid			owner;
	uint32		shape_size;
	uint32		unused;			/* 0 */
	int64		interval;		/* in microseconds */
} SavedSection;

typedef struct SavedBlock
{
	uint32		kind;
	uint32		nkeys;
	uint32		size;			/* of the keys, in bytes */
	uint32		unused;			/* 0 */
	uint64		begin;			/* positions, as of table_scan_position() */
	uint64		end;
} SavedBlock;

typedef union SavedRecord
{
	uint32		kind;
	SavedSection section;
	SavedBlock	block;
} SavedRecord;

typedef struct SavedRange
{
	Oid			dboid;
	Oid			relid;
	int64		begin;			/* offset of the section, */
	int64		end;			/* and of what follows its last block */
} SavedRange;

StaticAssertDecl(offsetof(SavedHeader, crc) % 8 == 0 &&
				 sizeof(SavedSection) == 32 && sizeof(SavedBlock) == 32 &&
				 sizeof(SavedRange) == 24,
				 "what is written must have no holes");

/* The end of the last block of a section */
#define SAVED_LAST_POSITION	PG_UINT64_MAX

/* A key as it is put into a block, and taken from one. */
typedef struct SavedKey
{
	int64		count;
	TimestampTz counted_at;		/* by the same clock as saved_at; 0: due at
								 * once */
	uint16		len;			/* as in KeyBytes */
	const char *data;			/* the stored form; not aligned */
} SavedKey;

/*
 * A file that is being written.  What is put into it is collected in memory,
 * and written in large pieces.
 */
typedef struct SavedWriter
{
	int			fd;				/* -1: nothing was written yet */
	SavedHeader header;
	char	   *data;			/* not written yet */
	size_t		size;
	size_t		allocated;
	size_t		block;			/* where the present block begins in it */
	SavedBlock	in_block;		/* the present block; nkeys is 0 if there is
								 * none */
	uint64		position;		/* where the next block begins */
	uint64		synced;			/* the kernel was told to write up to here */
	SavedRange *ranges;			/* of the sections */
} SavedWriter;

/* A file that is being read. */
typedef struct SavedReader
{
	int			fd;
	SavedHeader header;
	int64		end;			/* of the records */
	char	   *data;			/* the keys of the present block, */
	uint32		allocated;
	const char *next;			/* and those that are still to be taken */
	const char *data_end;
} SavedReader;

extern bool savefile_exists(const char *name);
extern void savefile_remove(const char *name);
extern const char *savefile_check(const char *name, SavedHeader *header);
extern void savefile_set_aside(const char *name, const char *reason);

extern SavedReader *savefile_open(const char *name);
extern void savefile_close(SavedReader *reader);
extern bool savefile_read_record(SavedReader *reader, int64 offset,
								 SavedRecord *record);
extern KeyShape *savefile_read_shape(SavedReader *reader, int64 offset,
									 const SavedSection *section);
extern void savefile_read_block(SavedReader *reader, int64 offset,
								const SavedBlock *block);
extern void savefile_next_key(SavedReader *reader, SavedKey *key);
extern SavedRange *savefile_read_ranges(const char *name, int *nranges);
extern int64 savefile_set_back_by(const SavedHeader *header, TimestampTz now);

extern SavedWriter *savefile_begin(TimestampTz now);
extern void savefile_put_section(SavedWriter *writer,
								 const SavedSection *section,
								 const KeyShape *shape, uint64 position);
extern void savefile_put_key(SavedWriter *writer, const SavedKey *key);
extern void savefile_end_portion(SavedWriter *writer, uint64 position);
extern bool savefile_finish(SavedWriter *writer);

/* The offset of what follows a record. */
static inline int64
savefile_next(int64 offset, const SavedRecord *record)
{
	return record->kind == RECORD_SECTION ?
		offset + (int64) sizeof(SavedSection) + record->section.shape_size :
		offset + (int64) sizeof(SavedBlock) + record->block.size;
}

#endif							/* STATBUFFER_SAVEFILE_H */
