# What the TAP tests share: a node with the extension, statements and sessions,
# buffers that note what their handlers are given and when, and ways to look at
# the processes.
#
# Everything that takes its time is polled for, up to 180 seconds (or what
# PG_TEST_TIMEOUT_DEFAULT says).

package StatbufferTest;

use strict;
use warnings;

use Exporter 'import';
use IPC::Run;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

our @EXPORT = qw(
  $patience sized new_node use_node major sql error_of
  start_session finish_session wait_for_session start_load
  make_buffer increment wait_for stored wait_for_stored
  close_gate open_gate wait_at_gate wait_for_no_worker processes worker_of
  lines_in_log has_not_crashed ms copy_installation replace_file
);

# The same as a setting, for what waits in the server.
our $patience = $PostgreSQL::Test::Utils::timeout_default . 's';

# sized(NUMBER, FEW): how much of something is enough where it does not matter
# how much it is: few where dev/check --discard-caches has the servers look up
# again and again what they would know.
sub sized
{
	my ($number, $few) = @_;

	return $ENV{STATBUFFER_DISCARD_CACHES} ? $few : $number;
}

# new_node(NAME, SETTING...): a running server with the extension in the
# database postgres.  sql() works with it from here on.
sub new_node
{
	my ($name, @settings) = @_;
	my $node = PostgreSQL::Test::Cluster->new($name);

	$node->init;
	$node->append_conf('postgresql.conf', join("\n",
		'max_worker_processes = 16',
		"log_line_prefix = '%m [%p] %b %q%a '",
		@settings, ''));
	$node->start;
	use_node($node);
	# creating it is core's work, and takes minutes on a server that forgets
	sql(($ENV{STATBUFFER_DISCARD_CACHES} ? 'SET debug_discard_caches = 0;' : '') . 'CREATE EXTENSION statbuffer');
	return $node;
}

# use_node(NODE[, DATABASE]): the server and the database that sql() and
# error_of() work with; the database is postgres by default.
my ($current_node, $current_database);

sub use_node
{
	my ($node, $database) = @_;

	$current_node = $node;
	$current_database = $database // 'postgres';
	return;
}

# sql(STATEMENTS): runs them in a session of their own, where nothing may fail.
# Returns what they return.
sub sql
{
	my ($statements) = @_;

	return $current_node->safe_psql($current_database, $statements);
}

# error_of(STATEMENT[, HOW]): runs a statement that must fail, as a test, and
# returns what it says.  HOW is what the test's name begins with.
sub error_of
{
	my ($statement, $how) = @_;
	my ($status, $out, $err) = $current_node->psql($current_database, $statement);

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	isnt($status, 0, (defined $how ? "$how: " : '') . "refused: $statement");
	return $err;
}

# start_session(NODE, DATABASE, STATEMENT...): a psql in the background that
# runs statements one after the other, up to the first error.  What it prints
# is in the session's {out} and {err}, and {name} is its application_name.
my $sessions = 0;

sub start_session
{
	my ($node, $database, @statements) = @_;
	my $session = { node => $node, name => 'session ' . ++$sessions, out => '', err => '' };

	$session->{run} = IPC::Run::start(
		[
			$node->installed_command('psql'), '-XqAt', '-v', 'ON_ERROR_STOP=1',
			'-d', $node->connstr($database) . " application_name='$session->{name}'",
			map { ('-c', $_) } @statements
		],
		'<' => \undef, '>' => \$session->{out}, '2>' => \$session->{err});
	return $session;
}

# finish_session(SESSION, WHAT): waits for its end, which must be without an
# error, as a test.  Returns its notices and warnings.
sub finish_session
{
	my ($session, $what) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	ok($session->{run}->finish, $what) or diag($session->{err});
	return $session->{err};
}

# wait_for_session(SESSION, CONDITION, WHAT): polls until its statement is at
# what the condition says, as a test.  The condition is about its row "a" of
# pg_stat_activity and about the lock "l" of pg_locks that it waits for, if
# any.
sub wait_for_session
{
	my ($session, $condition, $what) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	wait_for($session->{node}, 'postgres', qq{
			SELECT EXISTS (
				SELECT FROM pg_stat_activity a LEFT JOIN pg_locks l ON l.pid = a.pid AND NOT l.granted
				WHERE application_name = '$session->{name}' AND state = 'active' AND ($condition))},
		$what);
}

# start_load(NODE, SCRIPT, OPTION...): pgbench in the background with a script
# and these options, in the database postgres.  What it prints is in the load's
# {out} and {err}; its application_name is "load".
my $loads = 0;

sub start_load
{
	my ($node, $script, @options) = @_;
	my $file = $node->basedir . '/load_' . ++$loads . '.sql';
	my $load = { out => '', err => '' };

	append_to_file($file, $script);
	$load->{run} = IPC::Run::start(
		[
			$node->installed_command('pgbench'), '-n', '-f', $file, @options,
			$node->connstr('postgres') . ' application_name=load'
		],
		'<' => \undef, '>' => \$load->{out}, '2>' => \$load->{err});
	return $load;
}

# The major version of a node's PostgreSQL.  Compared with 19, a release
# candidate of 19 is less.
sub major
{
	my ($node) = @_;

	$node->pg_version =~ /^(\d+)/ or die 'what version is that?';
	return $1;
}

# make_buffer(NODE, DATABASE, NAME, OPTIONS): a buffer with one key column of
# text.  Its handler notes each call in the table NAME_calls; it waits as long
# as a session has closed the gate, and fails for keys that are in the table
# NAME_bad.
sub make_buffer
{
	my ($node, $database, $name, $options) = @_;

	$node->safe_psql($database, qq{
		CREATE TABLE ${name}_calls (key text, counter bigint, at timestamptz);
		CREATE TABLE ${name}_bad (key text);
		CREATE FUNCTION ${name}_store(key text, counter bigint) RETURNS void
		LANGUAGE plpgsql AS \$\$
		BEGIN
			IF EXISTS (SELECT FROM ${name}_bad b WHERE b.key = \$1) THEN
				RAISE 'bad key %', key;
			END IF;
			PERFORM pg_advisory_xact_lock_shared(4713);
			INSERT INTO ${name}_calls VALUES (key, counter, clock_timestamp());
		END
		\$\$;
		CREATE FOREIGN TABLE $name (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
		SERVER statbuffer OPTIONS (handler '${name}_store', $options);
	});
}

# One increment in a transaction and session of its own.
sub increment
{
	my ($node, $database, $buffer, $key, $count) = @_;

	$count //= 1;
	$node->safe_psql($database, "SELECT sb_increment('$key', $count, '$buffer')");
}

# wait_for(NODE, DATABASE, QUERY, WHAT[, EXPECTED]): polls until the query
# returns what is expected, by default true, as a test.  If that does not
# come, the buffers are shown as they are.
sub wait_for
{
	my ($node, $database, $query, $what, $expected) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	ok($node->poll_query_until($database, $query, $expected), $what)
	  or diag(($node->psql($database, 'TABLE sb_stat_buffers'))[1]);
}

# What the handler of a buffer has been given, in all.
sub stored
{
	my ($node, $database, $buffer) = @_;

	return $node->safe_psql($database,
		"SELECT coalesce(sum(counter), 0) FROM ${buffer}_calls");
}

sub wait_for_stored
{
	my ($node, $database, $buffer, $sum, $what) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	wait_for($node, $database,
		"SELECT coalesce(sum(counter), 0) = $sum FROM ${buffer}_calls", $what);
}

# While the gate is closed, handlers in the database wait.  Returns the
# session that keeps it closed.
sub close_gate
{
	my ($node, $database) = @_;
	my $session = $node->background_psql($database);

	$session->query_safe('SELECT pg_advisory_lock(4713)');
	return $session;
}

sub open_gate
{
	my ($session) = @_;

	$session->query_safe('SELECT pg_advisory_unlock(4713)');
	$session->quit;
}

# wait_at_gate(NODE, DATABASE, WHAT): polls until a handler waits at the gate,
# as a test.
sub wait_at_gate
{
	my ($node, $database, $what) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	wait_for($node, $database, q{
			SELECT EXISTS (SELECT FROM pg_locks
				WHERE locktype = 'advisory' AND objid = 4713 AND NOT granted)}, $what);
}

sub wait_for_no_worker
{
	my ($node, $what) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	wait_for($node, 'postgres', qq{
		SELECT count(*) = 0 FROM pg_stat_activity
		WHERE backend_type = 'statbuffer worker'}, $what);
}

# The process IDs of a backend type.
sub processes
{
	my ($node, $backend_type) = @_;

	return split /\n/, $node->safe_psql('postgres', qq{
		SELECT pid FROM pg_stat_activity
		WHERE backend_type = '$backend_type' ORDER BY pid});
}

# The process ID of a buffer's worker, if it has one.
sub worker_of
{
	my ($node, $database, $buffer) = @_;

	return $node->safe_psql($database,
		"SELECT pid FROM sb_stat_buffers WHERE relid = '$buffer'::regclass");
}

# has_not_crashed(NODE, WHAT): by the server's log, no process has crashed, as
# a test.
sub has_not_crashed
{
	my ($node, $what) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	unlike(slurp_file($node->logfile), qr/PANIC|TRAP|was terminated by signal/, $what);
}

# How many lines of the server's log match, from an offset on.
sub lines_in_log
{
	my ($node, $pattern, $offset) = @_;
	my $log = slurp_file($node->logfile, $offset // 0);
	my @lines = grep { /$pattern/ } split /\n/, $log;

	return scalar @lines;
}

# A copy of the installation in which files can be replaced.  PostgreSQL finds
# its files relative to its executables, so these are copied (or linked hard),
# and all others linked, each to where the copy expects it.  Returns the path
# for PostgreSQL::Test::Cluster->new(), and those of the libraries and of the
# extensions' files.
sub copy_installation
{
	my ($to) = @_;
	my %dirs = map { $_ => qx{pg_config --$_} } qw(bindir pkglibdir sharedir);

	chomp(%dirs);
	foreach my $dir (values %dirs)
	{
		system_or_bail('mkdir', '-p', "$to$dir");
	}
	system("cp -al $dirs{bindir}/. $to$dirs{bindir} 2>/dev/null") == 0
	  or system_or_bail("cp -a $dirs{bindir}/. $to$dirs{bindir}");
	foreach my $dir (@dirs{qw(pkglibdir sharedir)})
	{
		system_or_bail("cp -as $dir/. $to$dir");
	}
	return (
		($to . $dirs{bindir}) =~ s{/bin/?$}{}r,
		$to . $dirs{pkglibdir},
		"$to$dirs{sharedir}/extension");
}

# As a package manager does it: whoever has the old file open keeps it.
sub replace_file
{
	my ($file, $content) = @_;

	unlink("$file.new");
	open(my $out, '>:raw', "$file.new") or die "could not write $file.new: $!";
	print $out $content;
	close($out) or die "could not write $file.new: $!";
	rename("$file.new", $file) or die "could not rename $file.new: $!";
}

# A number of seconds, for people.
sub ms
{
	my ($seconds) = @_;

	return sprintf '%.1f ms', 1000 * $seconds;
}

1;
