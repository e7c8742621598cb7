# What cannot be stored when the server stops is saved, and loaded at the next
# start: whatever kept it from being stored, preloaded or not.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use IPC::Run;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;
use Time::HiRes qw(usleep);

my $db = 'postgres';

# The layout of the file's header: see SavedHeader in saved.c.
my $header_size = 56;
my %field_at = (version => 4, system_identifier => 8, timeline => 40, crc => 48);

sub saved_file
{
	my ($node, $name) = @_;

	return $node->data_dir . '/statbuffer.' . ($name // 'saved');
}

sub write_file
{
	my ($file, $content) = @_;

	open my $fh, '>:raw', $file or die "$file: $!";
	print $fh $content;
	close $fh or die "$file: $!";
	return;
}

# All files of ours in the data directory.
sub files
{
	my ($node) = @_;

	return join ' ', sort map { s,.*/,,r } glob $node->data_dir . '/statbuffer*';
}

# What a query shows may have been loaded before all the rest.
sub has_no_files
{
	my ($node, $what) = @_;

	for (1 .. 100 * $PostgreSQL::Test::Utils::timeout_default)
	{
		last if files($node) eq '';
		usleep(10_000);
	}
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	is(files($node), '', $what);
	return;
}

my $has_titles = -r '/proc/self/cmdline';

# The title of a process, if it is there.
sub title
{
	my ($pid) = @_;

	open my $fh, '<', "/proc/$pid/cmdline" or return '';
	return (<$fh> // '') =~ s/\0/ /gr;
}

# CRC-32C, as the server computes it.
sub crc32c
{
	my ($data) = @_;
	my $crc = 0xffffffff;

	foreach my $byte (unpack 'C*', $data)
	{
		$crc ^= $byte;
		$crc = $crc & 1 ? ($crc >> 1) ^ 0x82f63b78 : $crc >> 1 foreach 1 .. 8;
	}
	return $crc ^ 0xffffffff;
}

# A file whose checksum is right, with another value in its header.
sub forge
{
	my ($content, $field, $value) = @_;
	my $at = $field_at{crc};

	substr($content, $field_at{$field}, length $value) = $value;
	substr($content, $at, 4) =
	  pack('L', crc32c(substr($content, $header_size) . substr($content, 0, $at)));
	return $content;
}

# What each way to count leaves in the buffers: the same before the server
# stops, and after it has started again.
my @held = (
	[ q{SELECT sb_count('a', 'failing'), sb_count('b', 'failing')}, '7|-3' ],
	[ q{SELECT sb_count('a', 'slow')}, '5' ],
	[ q{SELECT sb_count('a', 'missing')}, '11' ],
	[ q{SELECT sb_count('a', 'hourly'), sb_count('b', 'hourly')}, '13|17' ],
	[ q{SELECT sb_count('a', 'at_once')}, '19' ],
	[ q{SELECT sb_count('a', 'stopped')}, '23' ],
	[ q{SELECT * FROM wide ORDER BY a, b},
		"1|x|2305843009213693952\n2||-2305843009213693952\n|y|1" ],
	[ q{SELECT count(*), sum(count), sum(length(key)) FROM many}, '20000|20000|' . 20000 * 40 ],
	[ q{SELECT state, pending FROM sb_stat_buffers WHERE buffer = 'hourly'}, 'idle|30' ]);

# Buffers that cannot be flushed when the server stops, each for a reason of its
# own, and what they hold.
sub fill
{
	my ($node) = @_;

	make_buffer($node, $db, 'failing', q{interval '20ms', backoff '20ms'});
	$node->safe_psql($db, q{INSERT INTO failing_bad VALUES ('a'), ('b')});
	make_buffer($node, $db, 'slow', q{interval '20ms', shutdown '100ms'});
	$node->safe_psql($db, q{
		CREATE OR REPLACE FUNCTION slow_store(key text, counter bigint) RETURNS void
		LANGUAGE plpgsql AS $$
		BEGIN
			IF EXISTS (SELECT FROM slow_bad) THEN
				PERFORM pg_sleep(600);
			END IF;
			INSERT INTO slow_calls VALUES (key, counter, clock_timestamp());
		END
		$$;
		INSERT INTO slow_bad VALUES ('all')});
	make_buffer($node, $db, 'missing', q{interval '20ms'});
	$node->safe_psql($db, 'DROP FUNCTION missing_store');
	make_buffer($node, $db, 'hourly', q{interval '1h', timeout '0'});
	make_buffer($node, $db, 'at_once', q{interval '1h', shutdown '0'});
	make_buffer($node, $db, 'stopped', q{interval '1h', shutdown '0'});
	make_buffer($node, $db, 'many', q{interval '1h', timeout '0'});
	$node->safe_psql($db, q{
		CREATE TABLE wide_calls (a int, b text, counter numeric);
		CREATE FUNCTION wide_store(a int, b text, counter bigint) RETURNS void
		LANGUAGE sql AS 'INSERT INTO wide_calls VALUES (a, b, counter)';
		CREATE FOREIGN TABLE wide (a int, b text, count bigint)
		SERVER statbuffer OPTIONS (handler 'wide_store', interval '1h', timeout '0');

		SELECT sb_increment('a', 7, 'failing'), sb_increment('b', -3, 'failing');
		SELECT sb_increment('a', 5, 'slow');
		SELECT sb_increment('a', 11, 'missing');
		SELECT sb_increment('a', 13, 'hourly'), sb_increment('b', 17, 'hourly');
		SELECT sb_increment('a', 19, 'at_once');
		SELECT sb_increment('a', 23, 'stopped');
		INSERT INTO wide VALUES (1, 'x', 2305843009213693952), (2, NULL, -2305843009213693952), (NULL, 'y', 1);
		INSERT INTO many SELECT repeat(md5(g::text), 2)::varchar(40) FROM generate_series(1, 20000) g;
		SELECT sb_stop('stopped')});
	wait_for($node, $db, q{SELECT bool_and(failures > 0) FROM sb_keys('failing')},
		'there is a handler that fails');
	wait_for($node, $db, q{SELECT in_flight = 5 FROM sb_stat_buffers WHERE buffer = 'slow'},
		'one that is slow');
	wait_for($node, $db, q{SELECT state = 'failing' FROM sb_stat_buffers WHERE buffer = 'missing'},
		'one that is missing');
	wait_for($node, $db, q{SELECT pid IS NULL FROM sb_stat_buffers WHERE buffer = 'hourly'},
		'and a buffer without a worker');
	return;
}

foreach my $preloaded (0, 1)
{
	my $how = $preloaded ? 'preloaded' : 'not preloaded';
	my $node = new_node($preloaded ? 'preloaded' : 'plain',
		$preloaded ? "shared_preload_libraries = 'statbuffer'" : ());
	my ($offset, $content);

	fill($node);
	has_no_files($node, "$how: while the server runs there is no file");

	# Whoever looks first after the start, whatever he looks at, sees it all.
	foreach my $i (0 .. $#held)
	{
		my ($query, $result) = @{ $held[$i] };

		is($node->safe_psql($db, $query), $result, "$how: before stop $i");
		$node->stop($i % 3 == 2 ? 'smart' : 'fast');
		is(files($node), 'statbuffer.saved', "$how: stop $i has saved a file");
		$node->start;
		is($node->safe_psql($db, $query), $result, "$how: and what was in it is there after start $i");
		has_no_files($node, "$how: the file is gone");
	}
	is($node->safe_psql($db, $_->[0]), $_->[1], "$how: still held") foreach @held;

	# A drain after a start waits for what was saved; so does a TRUNCATE.
	$node->restart;
	is($node->safe_psql($db, qq{SELECT sb_drain('hourly', '$patience'); SELECT sum(counter) FROM hourly_calls}),
		"t\n30", "$how: the first statement after a start drains it");
	$node->restart;
	$node->safe_psql($db, 'TRUNCATE at_once');
	is($node->safe_psql($db, q{SELECT coalesce(sum(count), 0) FROM at_once}), '0',
		"$how: the first statement after a start truncates it");

	# An increment does not wait for it, and adds to it.
	$node->restart;
	is($node->safe_psql($db, q{SELECT sb_increment('a', 1, 'failing'); SELECT sb_count('a', 'failing')}),
		"1\n8", "$how: increments add to what was saved");

	# When what was wrong is put right, all of it is stored, once.
	$node->restart;
	$node->safe_psql($db, q{
		DELETE FROM failing_bad;
		DELETE FROM slow_bad;
		CREATE FUNCTION missing_store(key text, counter bigint) RETURNS void
		LANGUAGE sql AS 'INSERT INTO missing_calls VALUES (key, counter, clock_timestamp())';
		SELECT sb_start('stopped')});
	$node->restart;
	is($node->safe_psql($db, qq{SELECT sb_drain('$_', '$patience')}), 't', "$how: $_ is drained")
	  foreach qw(failing slow missing hourly stopped many wide);
	is( $node->safe_psql($db, q{
			SELECT (SELECT string_agg(key || counter, ' ' ORDER BY key) FROM failing_calls),
				(SELECT string_agg(key || counter, ' ') FROM slow_calls),
				(SELECT string_agg(key || counter, ' ') FROM missing_calls),
				(SELECT string_agg(key || counter, ' ') FROM stopped_calls),
				(SELECT count(*) || ' ' || sum(counter) FROM many_calls),
				(SELECT string_agg(counter::text, ' ' ORDER BY a) FROM wide_calls)}),
		'a8 b-3|a5|a11|a23|20000 20000|2305843009213693952 -2305843009213693952 1',
		"$how: everything is stored once");
	$node->restart;
	has_no_files($node, "$how: when all is stored, nothing is saved");
	is($node->safe_psql($db, 'SELECT coalesce(sum(pending), 0) FROM sb_stat_buffers'), '0',
		"$how: nor is anything left to store");

	# Nothing is touched, and nothing goes wrong, when all is undone.
	$node->restart;
	is($node->safe_psql($db, q{
			BEGIN;
			SAVEPOINT s;
			SELECT sb_increment('undone', 1, 'hourly');
			ROLLBACK TO s;
			COMMIT;
			SELECT sb_count('undone', 'hourly') IS NULL}), "1\nt",
		"$how: a first increment that is undone");

	# A key keeps the time at which it is due.
	$node->safe_psql($db, q{ALTER FOREIGN TABLE hourly OPTIONS (SET interval '2h')});
	increment($node, $db, 'hourly', 'due');
	my $due = $node->safe_psql($db, q{SELECT due_at FROM sb_keys('hourly') WHERE key = 'due'});
	$node->restart;
	is($node->safe_psql($db, qq{
			SELECT due_at BETWEEN timestamptz '$due' - interval '1s' AND timestamptz '$due' + interval '1s'
			FROM sb_keys('hourly') WHERE key = 'due'}),
		't', "$how: a key is due when it was");

	# Keys of altered columns that cannot be converted stay apart, as they were.
	$node->safe_psql($db, 'ALTER FOREIGN TABLE hourly ALTER key TYPE int');
	$node->restart;
	increment($node, $db, 'hourly', '5', 2);
	is($node->safe_psql($db, q{SELECT sb_count('5', 'hourly')}), '2',
		"$how: counts of altered columns stay apart");
	$node->safe_psql($db, 'ALTER FOREIGN TABLE hourly ALTER key TYPE text');
	is( $node->safe_psql($db, q{
			SELECT coalesce(sb_count('due', 'hourly'), 0) + coalesce(sum(counter), 0)
			FROM hourly_calls WHERE key = 'due'}),
		'1', "$how: and are there, or stored, when they are altered back");
	$node->safe_psql($db, 'TRUNCATE hourly');

	# What was loaded is lost in a crash like everything else that is held, and
	# does not come back.
	increment($node, $db, 'hourly', 'a', 100);
	$node->restart;
	is($node->safe_psql($db, q{SELECT sb_count('a', 'hourly')}), '100', "$how: loaded");
	$node->stop('immediate');
	$node->start;
	is($node->safe_psql($db, q{SELECT sb_count('a', 'hourly') IS NULL}), 't',
		"$how: does not come back after a crash");

	# Not preloaded, the first session to count registers the launcher.  That
	# one would be gone, and the server told to stop, before the postmaster has
	# read of it.
	if ($how eq 'not preloaded')
	{
		my $postmaster = (split /\n/, slurp_file($node->data_dir . '/postmaster.pid'))[0];
		my $first = $node->background_psql($db);

		$first->query_safe('SELECT 1');
		kill 'STOP', $postmaster;
		my $done = eval {
			$first->query_safe(q{SELECT sb_increment('a', 7, 'hourly')});
			$first->quit;
			usleep(500_000);
			$node->command_ok([ 'pg_ctl', '-D', $node->data_dir, '-m', 'fast', '-W', 'stop' ],
				"$how: the server is told to stop");
			1;
		};
		my $error = $@;
		kill 'CONT', $postmaster;
		die $error if !$done;
		$node->stop('fast', fail_ok => 1);
		$node->start;
		is($node->safe_psql($db, q{SELECT sb_count('a', 'hourly')}), '7',
			"$how: what is counted before there is a launcher is saved");
		$node->safe_psql($db, 'TRUNCATE hourly');
	}

	# The remains of a crash while saving or loading are swept away.
	increment($node, $db, 'hourly', 'a', 100);
	$node->stop;
	$content = slurp_file(saved_file($node));
	write_file(saved_file($node, 'loading'), $content);
	unlink saved_file($node);
	write_file(saved_file($node, 'saved.tmp'), substr($content, 0, 60));
	$node->start;
	increment($node, $db, 'hourly', 'b', 1);
	is($node->safe_psql($db, q{SELECT sb_count('a', 'hourly') IS NULL, sb_count('b', 'hourly')}), 't|1',
		"$how: a file whose loading a crash has cut off is not read again");
	$node->restart;
	is($node->safe_psql($db, q{SELECT sb_count('b', 'hourly')}), '1', "$how: counting went on");
	has_no_files($node, "$how: what a crash has left is removed");

	# When it cannot be saved, that is told; the server stops, and starts.
	$node->safe_psql($db, q{TRUNCATE hourly; ALTER FOREIGN TABLE hourly OPTIONS (ADD shutdown '0')});
	increment($node, $db, 'hourly', 'lost');
	mkdir saved_file($node, 'saved.tmp') or die $!;
	$offset = -s $node->logfile;
	$node->stop;
	rmdir saved_file($node, 'saved.tmp') or die $!;
	like(slurp_file($node->logfile, $offset),
		qr/ERROR: .*could not create file "statbuffer.saved.tmp": Is a directory\n.*CONTEXT: .*they are lost if this fails/,
		"$how: when counts cannot be saved, the log tells that they are lost");
	has_no_files($node, "$how: and there is no file");
	$node->start;
	increment($node, $db, 'hourly', 'b');
	is($node->safe_psql($db, 'SELECT * FROM hourly'), 'b|1', "$how: the server counts");

	# A file that cannot be used is set aside, whatever is wrong with it.  The
	# server starts and counts.
	$node->safe_psql($db, 'TRUNCATE hourly');
	$node->safe_psql($db, q{INSERT INTO hourly SELECT 'key ' || g, g FROM generate_series(1, 100) g});
	$node->stop;
	$content = slurp_file(saved_file($node));
	my $flip = sub {
		my ($at) = @_;
		my $bad = $content;

		substr($bad, $at, 1) = chr(ord(substr($bad, $at, 1)) ^ 1);
		return $bad;
	};
	my @damages = (
		[ 'nothing', '', qr/too short/ ],
		[ 'half a header', substr($content, 0, 20), qr/too short/ ],
		[ 'a header', substr($content, 0, $header_size), qr/It has \d+ bytes instead of \d+/ ],
		[ 'one byte too few', substr($content, 0, -1), qr/It has \d+ bytes instead of \d+/ ],
		[ 'one byte too many', $content . 'x', qr/It has \d+ bytes instead of \d+/ ],
		[ 'another magic number', $flip->(1), qr/does not contain saved counts/ ],
		[ 'another file', "PG_VERSION\n" x 100, qr/does not contain saved counts/ ],
		[ 'a bit of the header', $flip->(33), qr/checksum is wrong/ ],
		[ 'a bit of the checksum', $flip->($field_at{crc}), qr/checksum is wrong/ ],
		[ 'a bit of a section', $flip->($header_size + 5), qr/checksum is wrong/ ],
		[ 'a bit of a count', $flip->(int(length($content) / 2)), qr/checksum is wrong/ ],
		[ 'the last bit', $flip->(length($content) - 1), qr/checksum is wrong/ ],
		[ 'another version', forge($content, 'version', pack('L', 77)), qr/Its version is 77, but .* reads version 4/ ],
		[ 'another cluster', forge($content, 'system_identifier', pack('Q', 1)), qr/another database cluster/ ],
		[ 'another timeline', forge($content, 'timeline', pack('L', 9)), qr/belongs to timeline 9, but the server is on timeline 1/ ],
		[ 'no permission', $content, qr/could not be read: Permission denied/ ],
		[ 'a directory', undef, qr/could not be read: Is a directory/ ]);
	foreach my $damage (@damages)
	{
		my ($what, $bad, $reason) = @$damage;

		unlink saved_file($node);
		if (defined $bad)
		{
			write_file(saved_file($node), $bad);
		}
		else
		{
			mkdir saved_file($node) or die $!;
		}
		chmod 0, saved_file($node) if $what eq 'no permission';
		$offset = -s $node->logfile;
		$node->start;
		increment($node, $db, 'hourly', 'new');
		is($node->safe_psql($db, q{SELECT * FROM hourly}), 'new|1', "$how, $what: the server counts");
		like(files($node), qr/^statbuffer\.saved\.\d+$/, "$how, $what: the file is set aside");
		like(slurp_file($node->logfile, $offset),
			qr/WARNING: .*cannot use file .*\n.*DETAIL: .*$reason.*\n.*HINT: .*renamed to "statbuffer\.saved\.\d+"/,
			"$how, $what: with a warning");
		$node->safe_psql($db, 'TRUNCATE hourly');
		$node->stop;
		foreach my $file (glob saved_file($node, 'saved.*'))
		{
			is(slurp_file($file), $bad, "$how, $what: and kept as it was")
			  if $what ne 'no permission' && defined $bad;
			defined $bad ? unlink $file : rmdir $file;
		}
	}

	# The real one is still good, for whoever puts it back.
	write_file(saved_file($node), $content);
	$node->start;
	is($node->safe_psql($db, 'SELECT count(*), sum(count) FROM hourly'), '100|5050',
		"$how: the file that was not damaged is loaded");
	$node->safe_psql($db, 'TRUNCATE hourly');

	# A buffer or a database that is dropped before anyone has looked.
	$node->safe_psql($db, 'CREATE DATABASE gone');
	$node->safe_psql('gone', 'CREATE EXTENSION statbuffer');
	make_buffer($node, 'gone', 'hourly', q{interval '1h'});
	increment($node, 'gone', 'hourly', 'a', 41);
	increment($node, 'gone', 'hourly', 'b', 1);
	make_buffer($node, $db, 'fleeting', q{interval '4s', shutdown '0'});
	increment($node, $db, 'fleeting', 'a', 43);
	$node->safe_psql($db, q{INSERT INTO failing_bad VALUES ('x')});
	increment($node, $db, 'failing', 'x', 47);
	$node->stop;
	$offset = -s $node->logfile;
	$node->start;
	$node->safe_psql($db, 'DROP DATABASE gone');
	$node->safe_psql($db, 'DROP FOREIGN TABLE fleeting');
	is($node->safe_psql($db, q{SELECT sb_count('x', 'failing')}), '47',
		"$how: what was not dropped is there");
	$node->wait_for_log(qr/dropped the counts of a database that no longer exists.*\n.* held counts of 42 altogether in 2 keys\./, $offset);
	$node->wait_for_log(qr/dropped the counts of a buffer that no longer exists.*\n.* held a count of 43 in 1 key\./, $offset);
	pass("$how: the log tells what was dropped with it");
	$node->safe_psql($db, qq{DELETE FROM failing_bad; SELECT sb_drain('failing', '$patience')});

	# The launcher is terminated just before the server stops.
	increment($node, $db, 'hourly', 'a', 53);
	my $session = $node->background_psql($db);
	$session->query_safe(q{SELECT sb_increment('b', 59, 'hourly')});
	$node->safe_psql($db, q{
		SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'statbuffer launcher'});
	$node->stop;
	$session->{run}->finish;
	$node->start;
	is($node->safe_psql($db, q{SELECT sb_count('a', 'hourly'), sb_count('b', 'hourly')}), '53|59',
		"$how: without a launcher, others save");
	is($node->safe_psql($db, 'TABLE sb_stat_buffers') ne '', 1, "$how: the view works");

	# Memory is smaller than it was: what does not fit yet is loaded as memory
	# gets free, and what was not loaded when the server stops is saved again.
	$node->safe_psql($db, q{
		TRUNCATE hourly;
		TRUNCATE many_calls;
		DROP FUNCTION many_store;
		ALTER FOREIGN TABLE many OPTIONS (ADD jitter '1h', ADD shutdown '0', ADD backoff '10ms');
		INSERT INTO many SELECT g || repeat('x', 200) FROM generate_series(1, 50000) g});
	$node->append_conf('postgresql.conf', "statbuffer.max_memory = '4MB'");
	foreach my $round (1 .. 3)
	{
		$offset = -s $node->logfile;
		$node->restart;

		# not preloaded, that has it loaded; if it is, memory is out
		$node->psql($db, q{SELECT sb_increment('a', 1, 'hourly')});
		$node->wait_for_log(qr/could not load all counts of the last shutdown yet: out of memory for statbuffer keys/, $offset);
		is(files($node), 'statbuffer.loading', "$how: what does not fit into memory is kept ($round)");
		like(title((processes($node, 'statbuffer launcher'))[0]), qr/statbuffer launcher loading saved counts: [0-9]+ %/,
			"$how: the process title shows how far it is ($round)")
		  if $has_titles;
	}
	my $stderr = ($node->psql($db, 'TRUNCATE many'))[2];
	like($stderr, qr/ERROR:  cannot truncate buffer "many" now\nDETAIL:  Counts .* still being loaded/,
		"$how: a buffer is not truncated while counts are still to be loaded");
	is($node->safe_psql($db, q{SELECT sb_drain('many', '1s')}), 'f',
		"$how: nor is it drained");
	$node->safe_psql($db, q{
		CREATE FUNCTION many_store(key text[], counter bigint[]) RETURNS void LANGUAGE sql
		AS 'INSERT INTO many_calls SELECT k, c, now() FROM unnest(key, counter) u (k, c)'});
	wait_for($node, $db, q{SELECT count(*) = 0 FROM pg_ls_dir('.') f WHERE f LIKE 'statbuffer%'},
		"$how: it is loaded as memory gets free");
	unlike(title((processes($node, 'statbuffer launcher'))[0]), qr/loading/, "$how: the process title shows that, too")
	  if $has_titles;
	is($node->safe_psql($db, qq{SELECT sb_drain('many', '$patience')}), 't', "$how: and flushed");
	is($node->safe_psql($db, q{SELECT count(*), count(DISTINCT key), sum(counter) FROM many_calls}),
		'50000|50000|50000', "$how: each key once");

	has_not_crashed($node, "$how: no process crashed");
	$node->stop;

	# Nobody else is there in single-user mode.
	my ($out, $err) = ('', '');
	IPC::Run::run(
		[ $node->installed_command('postgres'), '--single', '-D', $node->data_dir, $db ],
		'<' => \"SELECT sb_increment('a', 1, 'hourly')\n", '>' => \$out, '2>' => \$err);
	like("$out$err", qr/ERROR:  cannot increment in single-user mode/, "$how: in single-user mode increments are errors");
}

# A cold copy of the data directory goes on with the counts as a server of its
# own.  As a standby, it may have received what the primary has stored of them.
my $primary = PostgreSQL::Test::Cluster->new('primary');
$primary->init(allows_streaming => 1);
$primary->append_conf('postgresql.conf', "shared_preload_libraries = 'statbuffer'");
$primary->start;
$primary->safe_psql($db, 'CREATE EXTENSION statbuffer');
make_buffer($primary, $db, 'hits', q{interval '1h', shutdown '0'});
increment($primary, $db, 'hits', 'a', 61);
$primary->stop;
$primary->backup_fs_cold('cold');
my $copy = PostgreSQL::Test::Cluster->new('copy');
$copy->init_from_backup($primary, 'cold');
$copy->start;
is($copy->safe_psql($db, q{SELECT sb_count('a', 'hits')}), '61', 'a copy goes on with the counts');
$copy->stop;

my $standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($primary, 'cold', has_streaming => 1);
$primary->start;
is($primary->safe_psql($db, qq{SELECT sb_drain('hits', '$patience')}), 't', 'the primary stores them');
$standby->start;
$primary->wait_for_catchup($standby);
is($standby->safe_psql($db, q{SELECT sb_count('a', 'hits') IS NULL}), 't', 'a standby has no counts');
$standby->promote;
$standby->wait_for_log(qr/cannot use file .*\n.*DETAIL: .*belongs to timeline 1, but the server is on timeline 2/);
increment($standby, $db, 'hits', 'a', 1);
is($standby->safe_psql($db, qq{SELECT sb_drain('hits', '$patience')}), 't', 'the promoted standby counts');
is(stored($standby, $db, 'hits'), '62', 'and nothing is stored twice');
$standby->stop;

# Whoever saves shows in the process title how far it is.  This many keys take a
# moment.
SKIP:
{
	skip 'no /proc to read process titles from', 2 unless $has_titles;

	my $nkeys = sized(500_000, 1000);
	my $launcher = (processes($primary, 'statbuffer launcher'))[0];
	my $title;

	$primary->safe_psql($db, qq{INSERT INTO hits SELECT g FROM generate_series(1, $nkeys) g});
	$primary->command_ok([ 'pg_ctl', '-D', $primary->data_dir, '-m', 'fast', '-W', 'stop' ],
		'the server is told to stop');
	do
	{
		usleep(1000);
		$title = title($launcher);
	} while ($title ne '' && $title !~ /saving/);
	like($title, qr/statbuffer launcher saving counts: [0-9]+ of [0-9]+ keys/, 'the process title shows how much is saved');
	$primary->stop('fast', fail_ok => 1);
	$primary->start;
	$primary->safe_psql($db, 'TRUNCATE hits');
}
$primary->stop;

done_testing();
