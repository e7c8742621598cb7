# The world of the tests in which handlers fail or collide: what they store, and
# the keys that they refuse.  Buffers have keys of type int, and their handlers
# call
#
#	store(BUFFER, KEYS, COUNTS), to add counts up in the table "stored"
#	is_poisoned(BUFFER, KEYS), to learn whether one is in the table "poison"

package HandlerTest;

use strict;
use warnings;

use Exporter 'import';
use StatbufferTest;

our @EXPORT = qw(new_handler_node sum_stored left_over_function);

# A server with that world in the database postgres.
sub new_handler_node
{
	my $node = new_node('main', 'statbuffer.max_workers = 12');

	sql(q{
CREATE TABLE stored (
	buffer text, k int, n bigint NOT NULL, calls int NOT NULL DEFAULT 1,
	PRIMARY KEY (buffer, k));

-- keys that handlers refuse
CREATE TABLE poison (buffer text, k int, PRIMARY KEY (buffer, k));

CREATE FUNCTION is_poisoned(b text, keys int[]) RETURNS boolean LANGUAGE sql
AS 'SELECT EXISTS (SELECT FROM poison WHERE buffer = b AND k = ANY (keys))';

CREATE FUNCTION store(b text, keys int[], counts bigint[]) RETURNS void
LANGUAGE sql AS $$
	INSERT INTO stored AS s (buffer, k, n)
	SELECT b, k, n FROM unnest(keys, counts) AS u (k, n)
	ON CONFLICT (buffer, k) DO UPDATE
	SET n = s.n + EXCLUDED.n, calls = s.calls + 1
$$;
});
	return $node;
}

# sum_stored(BUFFER): what is stored of a buffer, in all.
sub sum_stored
{
	my ($buffer) = @_;

	return sql("SELECT coalesce(sum(n), 0) FROM stored WHERE buffer = '$buffer'");
}

# left_over_function(SCHEMA): the statement that makes the function left_over()
# in a schema, which tells what is in the session that a handler would not find
# in a new one.
sub left_over_function
{
	my ($schema) = @_;

	return qq{
	CREATE FUNCTION $schema.left_over() RETURNS text LANGUAGE sql AS \$\$
		SELECT concat_ws(', ',
			(SELECT string_agg('statement ' || name, ', ') FROM pg_prepared_statements),
			(SELECT string_agg('cursor ' || name, ', ') FROM pg_cursors WHERE is_holdable),
			(SELECT string_agg('lock ' || objid, ', ') FROM pg_locks
			  WHERE pid = pg_backend_pid() AND locktype = 'advisory' AND objsubid <= 2),
			(SELECT string_agg('relation ' || relname, ', ') FROM pg_class
			  WHERE relnamespace = pg_my_temp_schema() AND relkind = 'r'),
			(SELECT string_agg('setting ' || name, ', ') FROM pg_settings WHERE source = 'session'),
			'custom ' || nullif(current_setting('statbuffer_test.custom', true), ''))
	\$\$;};
}

1;
