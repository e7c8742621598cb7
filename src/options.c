/*-------------------------------------------------------------------------
 *
 * options.c
 *	  Options of a buffer.
 *
 * An option is a row of the table below and a field of BufferOptions.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <math.h>

#include "catalog/namespace.h"
#include "commands/defrem.h"
#include "compat.h"
#include "options.h"
#include "utils/builtins.h"
#include "utils/datetime.h"
#include "utils/guc.h"

/* Kinds of options, by how their values are parsed. */
typedef enum OptionKind
{
	OPTION_NAME,
	OPTION_TIME,
	OPTION_INT,
	OPTION_MEMORY,
	OPTION_BOOL,
	OPTION_RESTART,
	OPTION_WHEN_FULL
} OptionKind;

typedef struct OptionDef
{
	const char *name;
	OptionKind	kind;
	size_t		offset;
	const char *boot_value;		/* NULL: a name that is not given is NULL */
	int			min;
	int			max;
} OptionDef;

/*
 * The least bound of memory, in kilobytes.  The longest keys take two, so there
 * is always room for some dozens, and for hundreds of the usual ones.
 */
#define MAX_MEMORY_MIN		64

#define OPTION_FIELD(field)	offsetof(BufferOptions, field)

static const OptionDef option_defs[] = {
	{"target", OPTION_NAME, OPTION_FIELD(target), NULL, 0, 0},
	{"handler", OPTION_NAME, OPTION_FIELD(handler), "handle_flush", 0, 0},
	{"durable", OPTION_BOOL, OPTION_FIELD(durable), "false", 0, 0},
	{"interval", OPTION_TIME, OPTION_FIELD(interval), "5s", 0, INT_MAX},
	{"jitter", OPTION_TIME, OPTION_FIELD(jitter), "0", 0, INT_MAX},
	{"timeout", OPTION_TIME, OPTION_FIELD(timeout), "10s", 0, INT_MAX},
	{"backoff", OPTION_TIME, OPTION_FIELD(backoff), "1s", 1, INT_MAX},
	{"restart", OPTION_RESTART, OPTION_FIELD(temporary), "transient", 0, 0},
	{"shutdown", OPTION_TIME, OPTION_FIELD(shutdown), "5s", 0, SHUTDOWN_MAX_MSECS},
	{"batch_size", OPTION_INT, OPTION_FIELD(batch_size), "1000", 1, 100000},
	{"batch_time", OPTION_TIME, OPTION_FIELD(batch_time), "1s", 0, INT_MAX},
	{"handler_timeout", OPTION_TIME, OPTION_FIELD(handler_timeout), "0", 0, INT_MAX},
	{"max_memory", OPTION_MEMORY, OPTION_FIELD(max_memory), "0", MAX_MEMORY_MIN, MAX_KILOBYTES},
	{"when_full", OPTION_WHEN_FULL, OPTION_FIELD(discard), "error", 0, 0},
	{"stopped", OPTION_BOOL, OPTION_FIELD(stopped), "false", 0, 0},
};

/* Parse an option that is an amount of memory, in kilobytes; 0 is none. */
static void
set_memory(const OptionDef *def, const char *value, int *field)
{
	const char *hint = NULL;

	if (!parse_int(value, field, GUC_UNIT_KB, &hint))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("invalid value for option \"%s\": \"%s\"",
						def->name, value),
				 hint ? errhint("%s", _(hint)) :
				 errhint("Specify a number of kilobytes, or an amount of memory with a unit such as \"512kB\", \"64MB\" or \"1GB\".")));
	if (*field != 0 && (*field < def->min || *field > def->max))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("value \"%s\" is out of range for option \"%s\"",
						value, def->name),
				 errhint("The valid range is %d kB to %d kB, or 0 for no bound.",
						 def->min, def->max)));
}

/*
 * Parse a time that is written as an interval, such as "5 seconds", "00:00:05"
 * or "PT5S", into milliseconds.  Returns false if it is none.
 *
 * What a minus sign belongs to may depend on IntervalStyle, and negative times
 * are out of range anyway, so a value with one is refused.
 */
static bool
parse_interval(const char *value, double *msecs)
{
	char		buffer[256];
	char	   *fields[MAXDATEFIELDS];
	int			types[MAXDATEFIELDS];
	int			nfields;
	int			kind;
	struct pg_itm_in interval;

	if (strchr(value, '-') != NULL)
		return false;
	if (DecodeISO8601Interval(pstrdup(value), &kind, &interval) != 0 &&
		(ParseDateTime(value, buffer, sizeof(buffer), fields, types,
					   MAXDATEFIELDS, &nfields) != 0 ||
		 DecodeInterval(fields, types, nfields, INTERVAL_FULL_RANGE, &kind,
						&interval) != 0))
		return false;
	if (kind != DTK_DELTA)
		return false;
	*msecs = interval.tm_usec / 1000.0 +
		interval.tm_mday * (double) SECS_PER_DAY * 1000.0 +
		(interval.tm_mon + interval.tm_year * (double) MONTHS_PER_YEAR) *
		DAYS_PER_MONTH * SECS_PER_DAY * 1000.0;
	return true;
}

/* Raise the error that a number is out of an option's range. */
static void
report_range(const OptionDef *def, const char *value)
{
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 errmsg("value \"%s\" is out of range for option \"%s\"",
					value, def->name),
			 def->kind == OPTION_TIME ?
			 errhint("The valid range is %d ms to %d ms.",
					 def->min, def->max) :
			 errhint("The valid range is %d to %d.",
					 def->min, def->max)));
}

/*
 * Parse an option that is a time, in milliseconds: as settings are written, or as
 * an interval.
 */
static void
set_time(const OptionDef *def, const char *value, int *field)
{
	double		msecs;

	if (parse_int(value, field, GUC_UNIT_MS, NULL))
		msecs = *field;
	else if (!parse_interval(value, &msecs))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("invalid value for option \"%s\": \"%s\"",
						def->name, value),
				 errhint("Specify a number of milliseconds, a time with a unit such as \"500ms\", \"5s\" or \"1min\", or an interval such as \"5 seconds\".")));
	msecs = rint(msecs);
	if (!(msecs >= def->min && msecs <= def->max))
		report_range(def, value);
	*field = (int) msecs;
}

/* Parse an option that is one of two words; the field is for the second. */
static void
set_word(const OptionDef *def, const char *value, const char *first,
		 const char *second, bool *field)
{
	*field = strcmp(value, second) == 0;
	if (!*field && strcmp(value, first) != 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("invalid value for option \"%s\": \"%s\"",
						def->name, value),
				 errhint("Valid values are \"%s\" and \"%s\".",
						 first, second)));
}

/*
 * Parse an option's value into its field.  Raises an error if it is not valid.
 */
static void
set_option(BufferOptions *result, const OptionDef *def, const char *value)
{
	void	   *field = (char *) result + def->offset;
	const char *hint = NULL;
	List	   *names;

	switch (def->kind)
	{
		case OPTION_NAME:
			/* raises an error for an invalid name */
			names = compat_qualified_name_list(value);
			if (list_length(names) > 3)
				ereport(ERROR,
						(errcode(ERRCODE_SYNTAX_ERROR),
						 errmsg("improper qualified name (too many dotted names): %s",
								NameListToString(names))));
			*(char **) field = pstrdup(value);
			break;
		case OPTION_TIME:
			set_time(def, value, field);
			break;
		case OPTION_INT:
			if (!parse_int(value, (int *) field, 0, &hint))
				ereport(ERROR,
						(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						 errmsg("invalid value for option \"%s\": \"%s\"",
								def->name, value),
						 hint ? errhint("%s", _(hint)) :
						 errhint("Specify a whole number.")));
			if (*(int *) field < def->min || *(int *) field > def->max)
				report_range(def, value);
			break;
		case OPTION_MEMORY:
			set_memory(def, value, field);
			break;
		case OPTION_BOOL:
			if (!parse_bool(value, (bool *) field))
				ereport(ERROR,
						(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						 errmsg("invalid value for option \"%s\": \"%s\"",
								def->name, value),
						 errhint("Valid values are \"%s\" and \"%s\".",
								 "true", "false")));
			break;
		case OPTION_RESTART:
			set_word(def, value, "transient", "temporary", field);
			break;
		case OPTION_WHEN_FULL:
			set_word(def, value, "error", "discard", field);
			break;
	}
}

/* The names of all options, for an error message. */
static const char *
option_names(void)
{
	StringInfoData names;

	initStringInfo(&names);
	for (int i = 0; i < lengthof(option_defs); i++)
		appendStringInfo(&names, "%s%s", i > 0 ? ", " : "",
						 option_defs[i].name);
	return names.data;
}

/* Find an option in the list of a foreign table; NULL if it is not given. */
DefElem *
options_find(List *options, const char *name)
{
	ListCell   *lc;

	foreach(lc, options)
		if (strcmp(lfirst_node(DefElem, lc)->defname, name) == 0)
		return lfirst_node(DefElem, lc);
	return NULL;
}

/*
 * Parse the options of a foreign table, with defaults for those that are not
 * given.  Raises an error for the first invalid one.  The strings of the
 * result are in the current memory context.
 */
void
options_parse(List *options, BufferOptions *result)
{
	ListCell   *lc;

	memset(result, 0, sizeof(BufferOptions));
	for (int i = 0; i < lengthof(option_defs); i++)
		if (option_defs[i].boot_value != NULL)
			set_option(result, &option_defs[i], option_defs[i].boot_value);

	foreach(lc, options)
	{
		DefElem    *element = lfirst_node(DefElem, lc);
		const OptionDef *def = NULL;

		for (int i = 0; i < lengthof(option_defs); i++)
			if (strcmp(element->defname, option_defs[i].name) == 0)
				def = &option_defs[i];
		if (def == NULL)
			ereport(ERROR,
					(errcode(ERRCODE_FDW_INVALID_OPTION_NAME),
					 errmsg("invalid option \"%s\"", element->defname),
					 errhint("Valid options of a buffer are: %s.",
							 option_names())));
		set_option(result, def, defGetString(element));
	}

	if (result->target == NULL)
		return;
	if (options_find(options, "handler") != NULL)
		ereport(ERROR,
				(errcode(ERRCODE_FDW_INVALID_ATTRIBUTE_VALUE),
				 errmsg("options \"target\" and \"handler\" cannot be used together"),
				 errhint("Drop one of them. The counts go to the target, or to the handler.")));
	result->handler = NULL;
}
