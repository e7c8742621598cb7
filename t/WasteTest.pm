# What the tests of waste and limits share: how much memory processes and the
# server use, failures without end, and buffers that add up what they are given.

package WasteTest;

use strict;
use warnings;

use Exporter 'import';
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

our @EXPORT = qw(memory_used has_not_grown shared_memory $segments $fail_procedure make_summing_buffer stored_keys start_worker fill_buffer new_small_node);

# memory_used(NODE, PID): what a process has allocated and uses, as it says in
# the log.
sub memory_used
{
	my ($node, $pid) = @_;
	my $offset = -s $node->logfile;

	is(sql("SELECT pg_log_backend_memory_contexts($pid)"), 't', "process $pid is asked for its memory");
	$node->wait_for_log(qr/\[$pid\].* Grand total: .*; \d+ used/, $offset);
	slurp_file($node->logfile, $offset) =~ /\[$pid\].* Grand total: .*; (\d+) used/;
	return $1;
}

# Caches come and go, but what is left behind each time takes more than this.
my $tolerance = 64 * 1024;

# has_not_grown(BEFORE, AFTER, WHAT[, BOUND]): what was measured has not become
# more than is tolerated, or than the bound, as a test.
sub has_not_grown
{
	my ($before, $after, $what, $bound) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	cmp_ok($after - $before, '<', $bound // $tolerance, $what);
	note "$what: $before bytes, later $after";
}

# Dynamic shared memory comes in segments of a megabyte or more.
our $segments = 2.5 * 1024 * 1024;

# shared_memory(NODE): how much of it the server has.  It has to be in files
# (dynamic_shared_memory_type = mmap).
sub shared_memory
{
	my ($node) = @_;
	my $sum = 0;

	$sum += -s $_ // 0 foreach glob $node->data_dir . '/pg_dynshmem/*';
	return $sum;
}

# fail(BUFFER, N): a procedure that has N attempts fail for a buffer.
our $fail_procedure = q{
	-- Goes on until n more attempts have failed.  A request makes all keys due.
	CREATE PROCEDURE fail(b regclass, n int) LANGUAGE plpgsql AS $$
	DECLARE
		goal bigint := n + failures FROM sb_stat_buffers WHERE relid = b;
		last bigint := -1;
		so_far bigint;
	BEGIN
		LOOP
			SELECT failures INTO so_far FROM sb_stat_buffers WHERE relid = b;
			EXIT WHEN so_far >= goal;
			IF so_far <> last THEN
				PERFORM sb_increment('key ' || so_far % 7, 1, b), sb_increment('other ' || so_far % 5, 1, b);
				COMMIT;
				PERFORM sb_flush_all(b);
			ELSE
				PERFORM pg_sleep(0.0005);
			END IF;
			last := so_far;
		END LOOP;
	END $$;
};

# make_summing_buffer(NODE, NAME, OPTIONS): a buffer with arrays for its handler,
# which adds up what it is given in the table NAME_stored, or fails if NAME_bad
# has a row.
sub make_summing_buffer
{
	my ($node, $name, $options) = @_;

	$node->safe_psql('postgres', qq{
		CREATE UNLOGGED TABLE ${name}_stored (keys bigint, sum bigint, min text, max text);
		CREATE TABLE ${name}_bad (why text);
		CREATE FUNCTION ${name}_store(keys text[], counters bigint[]) RETURNS void LANGUAGE plpgsql AS \$\$
		BEGIN
			IF EXISTS (SELECT FROM ${name}_bad) THEN
				RAISE 'not now';
			END IF;
			INSERT INTO ${name}_stored SELECT count(DISTINCT k), sum(c), min(k), max(k) FROM unnest(keys, counters) u (k, c);
		END
		\$\$;
		CREATE FOREIGN TABLE $name (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
		SERVER statbuffer OPTIONS (handler '${name}_store', $options)});
	return;
}

# stored_keys(NODE, NAME): how many keys it was given, and the sum of their counts.
sub stored_keys
{
	my ($node, $name) = @_;

	return $node->safe_psql('postgres', "SELECT coalesce(sum(keys), 0), coalesce(sum(sum), 0) FROM ${name}_stored");
}

# start_worker(NODE, NAME): has a key of the buffer flushed, so that it has a worker
# for as long as its option "timeout" says, if the library is preloaded.
sub start_worker
{
	my ($node, $name) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	$node->safe_psql('postgres', "SELECT sb_increment('first', 1, '$name')");
	$node->safe_psql('postgres', "SELECT sb_flush('first', '$name')");
	wait_for($node, 'postgres', "SELECT pid IS NOT NULL FROM sb_stat_buffers WHERE relid = '$name'::regclass",
		"the buffer $name has a worker");
	return;
}

# fill_buffer(NODE, NAME, KEYS): fills a buffer up to its bound, or that of the
# server, with keys that begin with KEYS, by increments that leave nothing when
# they fail.
sub fill_buffer
{
	my ($node, $name, $keys) = @_;

	$node->safe_psql('postgres', qq{
		DO \$\$
		BEGIN
			FOR g IN 1 .. 1000000 LOOP
				PERFORM sb_async_increment('$keys ' || g, 1, '$name');
			END LOOP;
		EXCEPTION WHEN out_of_memory THEN
			NULL;
		END \$\$});
	return;
}

# A running server with the extension, where the system has less memory than
# statbuffer.max_memory allows, as with a small /dev/shm: a segment cannot be
# made.  Here because files have a limit, that of segments of 8 MB.
sub new_small_node
{
	my $node = PostgreSQL::Test::Cluster->new('small');

	$node->init(extra => [ '--wal-segsize', '1' ]);
	$node->append_conf('postgresql.conf', "max_worker_processes = 16\nmax_wal_size = 64MB\nmin_wal_size = 2MB");
	system_or_bail('bash', '-c', 'ulimit -f 7000 && exec "$0" "$@"', $node->installed_command('pg_ctl'),
		'-w', '-D', $node->data_dir, '-l', $node->logfile, 'start');
	$node->_update_pid(1);
	$node->safe_psql('postgres', 'CREATE EXTENSION statbuffer');
	return $node;
}

1;
