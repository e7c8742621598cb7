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
 * which of its shapes, the keys after it belong.  The shape, a KeyShape,
 * follows the section.
 */
#define RECORD_SECTION		1
#define RECORD_KEY			2

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

/* Followed by the key's stored form. */
typedef struct SavedKey
{
	uint32		kind;
	uint32		keylen;			/* as in KeyBytes */
	int64		count;
	TimestampTz counted_at;		/* by the same clock as saved_at; 0: due at
								 * once */
} SavedKey;

typedef union SavedRecord
{
	uint32		kind;
	SavedSection section;
	SavedKey	key;
} SavedRecord;

StaticAssertDecl(offsetof(SavedHeader, crc) % 8 == 0 &&
				 sizeof(SavedSection) == 32 && sizeof(SavedKey) == 24,
				 "what is written must have no holes");

/* A file that is being written. */
typedef struct SavedWriter
{
	FILE	   *file;			/* NULL: nothing was written yet */
	SavedHeader header;
} SavedWriter;

extern bool savefile_exists(const char *name);
extern void savefile_remove(const char *name);
extern const char *savefile_check(const char *name, SavedHeader *header);
extern void savefile_set_aside(const char *name, const char *reason);

extern FILE *savefile_open(const char *name, int64 offset);
extern void savefile_read_header(FILE *file, SavedHeader *header);
extern bool savefile_read_record(FILE *file, SavedRecord *record);
extern KeyShape *savefile_read_shape(FILE *file, const SavedSection *section);
extern void savefile_read_key(FILE *file, const SavedKey *key,
							  KeySpace *space);
extern int64 savefile_set_back_by(const SavedHeader *header, TimestampTz now);

extern SavedWriter *savefile_begin(TimestampTz now);
extern void savefile_put_section(SavedWriter *writer,
								 const SavedSection *section,
								 const KeyShape *shape);
extern void savefile_put_key(SavedWriter *writer, const SavedKey *key,
							 const char *data);
extern void savefile_finish(SavedWriter *writer);

#endif							/* STATBUFFER_SAVEFILE_H */
