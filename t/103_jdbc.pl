# The JDBC driver counts: batches, as they are and rewritten, connections that
# only read, and updates as Hibernate writes them.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use ClientTest;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

my $driver = '/usr/share/java/postgresql.jar';
my ($java) = programs('java') or plan skip_all => 'java is not installed';

plan skip_all => 'libpostgresql-jdbc-java is not installed' unless -e $driver;
plan skip_all => 'the java that is installed has no compiler'
  unless can_run("a JDK", $java, '--describe-module', 'jdk.compiler');

my $node = client_node('jdbc');
my $seen = run_client({}, $java, '-cp', $driver, program('java/WithJdbc.java'));

note("JDBC driver $seen->{version}");
is($seen->{batch}, '[1]', 'each statement of a batch has inserted a row');
is($seen->{rewritten}, '[-2]', 'of those that it has made one, it does not know');
is($seen->{'batch error'}, '23502', 'a batch with an error is an error');
is($seen->{executeUpdate}, '0100E', 'executeUpdate() does not take a result');
is($seen->{called}, 4, 'a function is called as one');
is($seen->{readonly}, '25006', 'INSERT is refused where only reading is allowed');
is($seen->{rows}, 1, 'an UPDATE of the view tells that it has updated a row');
is($seen->{'rows of a batch'}, '[1]', 'in a batch, too');
is($seen->{generated}, 'true', 'the key that was generated comes back');
is($seen->{'as read'}, 1, 'an update of a row as it was read');
is($seen->{stale}, 0, 'a row that is not as it was read is not updated');
is($seen->{updatable}, '24000', 'a result set of the view is not updatable: it has no primary key');

# What was not in a transaction is counted in spite of the error.
counted('jdbc', $seen, called => 4, readonly => 1);

has_not_crashed($node, 'no process has crashed');
$node->stop;
done_testing();
